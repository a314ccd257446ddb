//! Golden: every block format gives the values of the `gguf` package, bit for bit.
//! `data/quant_golden.py` made the data.

use tandem_kernels::quant::{BlockFormat, dequantize};

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digit).collect()
}

#[test]
fn every_format_has_the_values_of_its_reference() {
    let mut formats = BlockFormat::ALL.to_vec();
    for line in include_str!("data/quant_golden.txt").lines() {
        let [name, blocks, values] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let format = formats.iter().position(|format| format.name() == name).expect(name);
        let format = formats.remove(format);
        let expected: Vec<f32> =
            bytes(values).as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        let mut out = vec![0.0; expected.len()];
        dequantize(format, &bytes(blocks), &mut out);
        for (i, (got, expected)) in out.iter().zip(&expected).enumerate() {
            // Equality of values: the package gives -0 where a product of zero is negative.
            assert_eq!(got, expected, "{name} element {i}");
        }
    }
    assert_eq!(formats, [], "formats without data");
}

#[test]
#[should_panic(expected = "17 bytes are not the Q4_0 blocks of 32 elements")]
fn a_wrong_size_names_what_was_found() {
    dequantize(BlockFormat::Q4_0, &[0; 17], &mut [0.0; 32]);
}
