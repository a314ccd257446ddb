//! Tensors cut and rearranged between the file and the backend: one file's fused projection is another's
//! three, and rows stand in the order that the kernels want. Bytes are borrowed from the file until
//! something moves.

use std::borrow::Cow;

use crate::weights::quantize::reencode;
use crate::weights::{Dtype, Tensor, TensorView};

/// A tensor, or a stretch of one, whose outermost extent counts rows.
#[derive(Clone, Debug)]
pub(crate) struct Part<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl<'a> Part<'a> {
    pub(crate) fn of(tensor: Tensor<'a>) -> Self {
        Part { dtype: tensor.dtype, shape: tensor.shape, data: tensor.data }
    }

    /// Parts of one shape as the rows of a tensor of one dimension more; of different types, as f32.
    ///
    /// # Panics
    /// If there is none, or they are of different shapes.
    pub(crate) fn stack(parts: &[Part<'_>]) -> Part<'static> {
        let first = &parts[0];
        assert!(
            parts.iter().all(|part| part.shape == first.shape),
            "parts of a stack are alike: this is a bug"
        );
        let same = parts.iter().all(|part| part.dtype == first.dtype);
        let mut data = Vec::new();
        for part in parts {
            match same {
                true => data.extend_from_slice(&part.data),
                false => data.extend(part.view().to_f32().into_iter().flat_map(f32::to_le_bytes)),
            }
        }
        let shape = std::iter::once(parts.len()).chain(first.shape.iter().copied()).collect();
        Part { dtype: if same { first.dtype } else { Dtype::F32 }, shape, data: Cow::Owned(data) }
    }

    /// Element type.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Encodes the elements anew.
    pub(crate) fn encode(&mut self, dtype: Dtype) {
        if dtype != self.dtype {
            self.data = Cow::Owned(reencode(&self.view(), dtype));
            self.dtype = dtype;
        }
    }

    pub(crate) fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: &self.shape, data: &self.data }
    }

    /// Consecutive stretches of `rows` rows each, which add up to all.
    pub(crate) fn split(self, rows: &[usize]) -> Vec<Self> {
        let mut start = 0;
        let stretch = |&rows: &usize| {
            let part = self.rows(start, rows);
            start += rows;
            part
        };
        rows.iter().map(stretch).collect()
    }

    /// Row `index` as a tensor of one dimension less.
    pub(crate) fn item(&self, index: usize) -> Self {
        let mut item = self.rows(index, 1);
        item.shape.remove(0);
        item
    }

    fn rows(&self, start: usize, count: usize) -> Self {
        let row_bytes = self.row_bytes();
        let range = start * row_bytes..(start + count) * row_bytes;
        let data = match &self.data {
            Cow::Borrowed(data) => Cow::Borrowed(&data[range]),
            Cow::Owned(data) => Cow::Owned(data[range].to_vec()),
        };
        let mut shape = self.shape.clone();
        shape[0] = count;
        Part { dtype: self.dtype, shape, data }
    }

    fn row_bytes(&self) -> usize {
        self.data.len() / self.shape[0].max(1)
    }

    /// Every stretch of `order.len()` rows in a new order: row `i` becomes what was row `order[i]`.
    pub(crate) fn reorder_rows(&mut self, order: &[usize]) {
        let row_bytes = self.row_bytes();
        let mut data = Vec::with_capacity(self.data.len());
        for stretch in self.data.chunks_exact(order.len() * row_bytes) {
            for &row in order {
                data.extend_from_slice(&stretch[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
        self.data = Cow::Owned(data);
    }

    /// A matrix with rows and columns exchanged.
    ///
    /// # Panics
    /// If it is no matrix.
    pub(crate) fn transpose(&mut self) {
        let &[rows, columns] = self.shape.as_slice() else {
            panic!("only a matrix is transposed: this is a bug")
        };
        if matches!(self.dtype, Dtype::Quantized(_)) {
            // Blocks lie along rows: what was a row's block would be a column's.
            self.widen(|element| element);
        }
        let size = self.data.len() / (rows * columns).max(1);
        let mut data = Vec::with_capacity(self.data.len());
        for column in 0..columns {
            for row in 0..rows {
                let at = (row * columns + column) * size;
                data.extend_from_slice(&self.data[at..at + size]);
            }
        }
        self.data = Cow::Owned(data);
        self.shape = vec![columns, rows];
    }

    /// Adds `offset` to every element, in f32.
    pub(crate) fn add(&mut self, offset: f32) {
        if offset != 0.0 {
            self.widen(|element| element + offset);
        }
    }

    /// Makes every element an f32, and that what `change` makes of it.
    fn widen(&mut self, change: impl Fn(f32) -> f32) {
        let elements = self.view().to_f32().into_iter().flat_map(|element| change(element).to_le_bytes());
        self.data = Cow::Owned(elements.collect());
        self.dtype = Dtype::F32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(data: &[u8], shape: &[usize]) -> Part<'static> {
        let bytes = data.iter().flat_map(|&x| f32::from(x).to_le_bytes()).collect();
        Part { dtype: Dtype::F32, shape: shape.to_vec(), data: Cow::Owned(bytes) }
    }

    #[test]
    fn cut_reordered_transposed_and_raised() {
        let parts = part(&[1, 2, 3, 4, 5, 6], &[3, 2]).split(&[1, 2]);
        assert_eq!(parts[1].view().to_f32(), [3.0, 4.0, 5.0, 6.0]);
        assert_eq!(parts[1].view().shape, [2, 2]);
        let mut rows = part(&[1, 2, 3, 4, 5, 6, 7, 8], &[4, 2]);
        rows.reorder_rows(&[1, 0]);
        assert_eq!(rows.view().to_f32(), [3.0, 4.0, 1.0, 2.0, 7.0, 8.0, 5.0, 6.0]);
        let mut item = part(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], &[2, 2, 3]).item(1);
        item.transpose();
        item.add(0.5);
        assert_eq!(item.view().to_f32(), [7.5, 10.5, 8.5, 11.5, 9.5, 12.5]);
        assert_eq!(item.view().shape, [3, 2]);
    }
}
