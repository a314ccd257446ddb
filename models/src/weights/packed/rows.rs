//! Work on the rows of a matrix, on every core. Rows do not know of each other, so the result does not depend
//! on how many there are.

use std::ops::Range;

/// Fills `out`, rows of `width` items each, with what `fill` makes of the row's number.
///
/// # Panics
/// If `width` is 0.
pub(super) fn fill_rows<T: Send>(out: &mut [T], width: usize, fill: impl Fn(usize, &mut [T]) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = out.len() / width;
    let share = rows.div_ceil(threads).max(1);
    let fill = &fill;
    std::thread::scope(|scope| {
        for (index, out) in out.chunks_mut(share * width).enumerate() {
            scope.spawn(move || {
                out.chunks_exact_mut(width).enumerate().for_each(|(row, out)| fill(index * share + row, out));
            });
        }
    });
}

/// Which scale an element has: they lie in a grid, each for a block of the matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Rows and columns of a block; those at the edges may be cut.
    pub(super) block: [usize; 2],
    /// Scales of a row of the grid.
    pub(super) columns: usize,
}

impl Grid {
    /// The grid of scales of shape `scales` for a matrix of `[rows, columns]`: one for all, one for each row,
    /// equal stretches of each row, or blocks of the given extents. `None` if it is none of these.
    pub(super) fn find(
        [rows, columns]: [usize; 2],
        scales: &[usize],
        block: Option<[usize; 2]>,
    ) -> Option<Self> {
        let (of_rows, of_columns) = match *scales {
            [] => (1, 1),
            [rows] => (rows, 1),
            [rows, columns] => (rows, columns),
            _ => return None,
        };
        let block = match block {
            _ if (of_rows, of_columns) == (1, 1) => [rows, columns],
            Some(block) => block,
            None if of_rows == rows && of_columns > 0 && columns.is_multiple_of(of_columns) => {
                [1, columns / of_columns]
            }
            None => return None,
        };
        let fits = block.iter().all(|extent| *extent > 0)
            && rows.div_ceil(block[0]) == of_rows
            && columns.div_ceil(block[1]) == of_columns;
        fits.then_some(Grid { block, columns: of_columns })
    }

    /// The scales of the blocks that `row` goes through.
    pub(super) fn row(&self, row: usize) -> Range<usize> {
        let start = row / self.block[0] * self.columns;
        start..start + self.columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_are_told_by_their_shapes() {
        let find = |scales: &[usize], block| Grid::find([6, 256], scales, block).map(|grid| grid.block);
        assert_eq!(find(&[], None), Some([6, 256]));
        assert_eq!(find(&[1, 1], Some([128, 128])), Some([6, 256]));
        assert_eq!(find(&[6], None), Some([1, 256]));
        assert_eq!(find(&[6, 2], None), Some([1, 128]));
        assert_eq!(find(&[1, 2], Some([128, 128])), Some([128, 128]));
        assert_eq!(find(&[2, 3], Some([4, 100])), Some([4, 100]));
        for (scales, block) in
            [(&[2, 2][..], None), (&[6, 3], None), (&[1, 3], Some([128, 128])), (&[0], None)]
        {
            assert_eq!(find(scales, block), None, "{scales:?} {block:?}");
        }
        let grid = Grid::find([6, 256], &[2, 3], Some([4, 100])).unwrap();
        assert_eq!((grid.row(3), grid.row(4)), (0..3, 3..6));
    }

    #[test]
    fn every_row_is_filled_once() {
        for rows in [1, 2, 5, 64] {
            let mut out = vec![0usize; rows * 3];
            fill_rows(&mut out, 3, |row, out| {
                out.iter_mut().enumerate().for_each(|(i, x)| *x += row * 3 + i)
            });
            assert!(out.iter().enumerate().all(|(i, x)| *x == i));
        }
    }
}
