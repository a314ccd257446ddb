//! Safetensors files that keep to the format most of the time, so that what is wrong is what their tensors are:
//! of another shape, type, name or content than the configuration says, with as many bytes as they claim.

use serde_json::{Map, Value, json};

use super::{NUMBERS, change_bytes, json as change_json, times};
use crate::fuzz::random::Random;

/// A tensor of the file.
#[derive(Clone)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    data: Vec<u8>,
}

/// Types, and the bytes of an element.
const TYPES: [(&str, usize); 14] = [
    ("BOOL", 1),
    ("U8", 1),
    ("I8", 1),
    ("F8_E5M2", 1),
    ("F8_E4M3", 1),
    ("I16", 2),
    ("U16", 2),
    ("F16", 2),
    ("BF16", 2),
    ("I32", 4),
    ("U32", 4),
    ("F32", 4),
    ("F64", 8),
    ("I64", 8),
];

/// What packed tensors are called behind their matrix's name.
const ENDINGS: [&str; 14] = [
    "weight",
    "bias",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "blocks",
    "",
];

/// Bytes that a changed tensor is given, at most; one that claims more lies.
const MAX_BYTES: u64 = 1 << 15;

pub(crate) fn safetensors(file: &[u8], random: &mut Random) -> Vec<u8> {
    let (mut tensors, mut metadata) = read(file);
    for _ in 0..times(random) {
        if tensors.is_empty() {
            break;
        }
        match random.below(16) {
            0 => metadata = change_metadata(random),
            _ => change(&mut tensors, random),
        }
    }
    write(tensors, metadata, random)
}

fn read(file: &[u8]) -> (Vec<Tensor>, Option<Value>) {
    let len = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let (header, data) = (&file[8..8 + len], &file[8 + len..]);
    let mut header: Map<String, Value> =
        serde_json::from_slice(header).expect("the good file is well-formed");
    let metadata = header.remove("__metadata__");
    let mut tensors: Vec<(u64, Tensor)> = header
        .into_iter()
        .map(|(name, entry)| {
            let number = |value: &Value| value.as_u64().expect("a number");
            let numbers = |key: &str| entry[key].as_array().expect("a list").iter().map(number).collect();
            let offsets: Vec<u64> = numbers("data_offsets");
            let data = data[offsets[0] as usize..offsets[1] as usize].to_vec();
            let dtype = entry["dtype"].as_str().expect("a type").to_owned();
            (offsets[0], Tensor { name, dtype, shape: numbers("shape"), data })
        })
        .collect();
    tensors.sort_by_key(|(start, _)| *start);
    (tensors.into_iter().map(|(_, tensor)| tensor).collect(), metadata)
}

fn change_metadata(random: &mut Random) -> Option<Value> {
    match random.below(6) {
        0 => None,
        1 => Some(json!({"format": "pt"})),
        2 => Some(json!({"format": 1})),
        3 => Some(json!([])),
        4 => Some(json!({"x": "y".repeat(random.below(5000))})),
        _ => Some(json!({"": {"": {}}})),
    }
}

fn change(tensors: &mut Vec<Tensor>, random: &mut Random) {
    let (at, other) = (random.below(tensors.len()), random.below(tensors.len()));
    match random.below(12) {
        0 => drop(tensors.remove(at)),
        1 => {
            let mut again = tensors[at].clone();
            again.name = renamed(&again.name, &tensors[other].name, random);
            tensors.push(again);
        }
        2 => tensors[at].name = renamed(&tensors[at].name, &tensors[other].name, random),
        3 if at != other => {
            let name = tensors[other].name.clone();
            tensors[other].name = std::mem::replace(&mut tensors[at].name, name);
        }
        4 => {
            let Tensor { dtype, shape, data, .. } = tensors[other].clone();
            tensors[at] = Tensor { name: tensors[at].name.clone(), dtype, shape, data };
        }
        5 | 6 => tensors[at].reshape(random),
        7 | 8 => tensors[at].retype(random),
        9 | 10 => tensors[at].extend(random),
        _ => tensors[at].refill(random),
    }
}

/// Another name for a tensor: another part of its matrix, or the same part of another.
fn renamed(name: &str, other: &str, random: &mut Random) -> String {
    let stem = |name: &str| name.rsplit_once('.').map_or(String::new(), |(stem, _)| stem.to_owned());
    match random.below(5) {
        0 => format!("{name}_"),
        1 => format!("{}.{}", stem(other), name.rsplit('.').next().unwrap_or(name)),
        2 => random.pick(&["", "a", "lm_head.weight", "\u{0}", "model.layers.99.x"]).to_owned(),
        _ => format!("{}.{}", stem(name), random.pick(&ENDINGS)),
    }
}

impl Tensor {
    /// Another shape of as many elements, or of as many as can be said: an extent may have become any number.
    fn reshape(&mut self, random: &mut Random) {
        let shape = &mut self.shape;
        match random.below(5) {
            0 => shape.reverse(),
            1 => *shape = vec![shape.iter().fold(1, |all, extent| all.saturating_mul(*extent))],
            2 => shape.insert(random.below(shape.len() + 1), 1),
            3 if shape.len() > 1 => {
                let last = shape.pop().unwrap_or(1);
                let at = random.below(shape.len());
                shape[at] = shape[at].saturating_mul(last);
            }
            _ => {
                let Some(at) = (0..shape.len()).find(|&at| shape[at] > 1 && shape[at].is_multiple_of(2))
                else {
                    return;
                };
                shape[at] /= 2;
                shape.insert(random.below(shape.len() + 1), 2);
            }
        }
    }

    /// Another type, of the same width most of the time.
    fn retype(&mut self, random: &mut Random) {
        let width = TYPES.iter().find(|(name, _)| *name == self.dtype).map_or(1, |(_, width)| *width);
        let (dtype, new_width) = match random.below(4) {
            0 => random.pick(&TYPES),
            _ => random.pick(&TYPES.iter().copied().filter(|(_, w)| *w == width).collect::<Vec<_>>()),
        };
        self.dtype = dtype.to_owned();
        if new_width != width {
            self.fit(random);
        }
    }

    /// Another extent, with the bytes that it takes.
    fn extend(&mut self, random: &mut Random) {
        if self.shape.is_empty() {
            return;
        }
        let at = random.below(self.shape.len());
        let extent = self.shape[at];
        self.shape[at] = match random.below(8) {
            0 => 0,
            1 => random.pick(&NUMBERS),
            2 => extent.wrapping_mul(2),
            3 => extent / 2,
            4 => extent.wrapping_sub(1),
            5 => 1,
            _ => extent.wrapping_add(1),
        };
        self.fit(random);
    }

    /// As many bytes as shape and type take; what claims too many keeps what it has.
    fn fit(&mut self, random: &mut Random) {
        let width = TYPES.iter().find(|(name, _)| *name == self.dtype).map_or(1, |(_, width)| *width);
        let bytes = self.shape.iter().try_fold(width as u64, |all, extent| all.checked_mul(*extent));
        if let Some(bytes) = bytes.filter(|bytes| *bytes <= MAX_BYTES) {
            let fill = random.pick(&[0, 0x01, 0x3f, 0x7f, 0xff]);
            self.data.resize(bytes as usize, fill);
        }
    }

    /// Other contents of the same length.
    fn refill(&mut self, random: &mut Random) {
        match random.below(4) {
            0 => self.data.fill(random.pick(&[0, 0x7f, 0x80, 0xff])),
            1 => self.data.fill_with(|| random.next() as u8),
            _ if self.data.len() >= 8 => {
                for _ in 0..1 + random.below(8) {
                    let width = random.pick(&[2, 4, 8]);
                    let at = random.below(self.data.len() / width) * width;
                    let number = random.pick(&NUMBERS).to_le_bytes();
                    self.data[at..at + width].copy_from_slice(&number[..width]);
                }
            }
            _ => {}
        }
    }
}

/// The file: in most cases what the format wants, whatever the tensors are.
fn write(tensors: Vec<Tensor>, metadata: Option<Value>, random: &mut Random) -> Vec<u8> {
    let mut header = Map::new();
    if let Some(metadata) = metadata {
        header.insert("__metadata__".to_owned(), metadata);
    }
    let (mut data, mut start) = (Vec::new(), 0);
    let broken = random.below(8) == 0;
    for tensor in tensors {
        let mut offsets = [start, start + tensor.data.len() as u64];
        if broken && random.below(8) == 0 {
            let at = random.below(2);
            offsets[at] = match random.below(4) {
                0 => random.pick(&NUMBERS),
                1 => offsets[at].wrapping_add(1),
                2 => offsets[at].wrapping_sub(1),
                _ => offsets[1 - at],
            };
        }
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
        // A name that comes twice loses its first tensor, and the data have a hole.
        header.insert(tensor.name, entry);
        start += tensor.data.len() as u64;
        data.extend(tensor.data);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    if broken {
        match random.below(4) {
            0 => change_bytes(&mut data, random),
            1 => change_bytes(&mut header, random),
            2 => header = change_json(&header, random),
            _ => {}
        }
    }
    while !broken && !header.len().is_multiple_of(8) {
        header.push(b' ');
    }
    let lies = broken && random.below(8) == 0;
    let len = if lies { random.pick(&NUMBERS) } else { header.len() as u64 };
    [&len.to_le_bytes()[..], &header, &data].concat()
}

#[cfg(test)]
mod tests {
    use super::{Random, Tensor};

    #[test]
    fn a_shape_of_more_elements_than_can_be_counted_is_reshaped() {
        for execution in 0..100 {
            let (name, dtype) = ("weight".to_owned(), "F32".to_owned());
            let mut tensor = Tensor { name, dtype, shape: vec![u64::MAX, 3, 1 << 63], data: vec![] };
            tensor.reshape(&mut Random::new(103, execution));
            assert!(!tensor.shape.is_empty());
        }
    }
}
