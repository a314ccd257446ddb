//! API keys: what a key may do, the file that remembers them, and the ring that requests are checked
//! against.
//!
//! A key from the file is 256 random bits and kept as its SHA-256 only: it cannot be guessed, so a slow
//! hash would cost every request and protect nothing. The ring holds everything that a request needs;
//! the file is read and written by a thread of its own, off the requests' way.

mod file;
mod keeper;
mod ring;
mod rules;

pub use file::{KeyEntry, KeyFile, KeyFileError, NewKey};
pub use keeper::Keeper;
pub use ring::{Client, KeyUse, Keyring, Refusal, Standing};
pub use rules::{Budget, KeyRules, Lanes, duration_from_text};

use sha2::{Digest as _, Sha256};

/// What is kept of a key.
type KeyHash = [u8; 32];

/// What keys begin with, so that scanners for leaked secrets know one when they see it.
const KEY_PREFIX: &str = "tdm_";

fn hash(key: &[u8]) -> KeyHash {
    Sha256::digest(key).into()
}

/// A new key: 256 bits from the system's generator, in hexadecimal.
fn random_key() -> String {
    let bits: [u8; 32] = rand::random();
    let mut key = String::with_capacity(KEY_PREFIX.len() + 2 * bits.len());
    key.push_str(KEY_PREFIX);
    for byte in bits {
        key.push(char::from_digit(u32::from(byte >> 4), 16).expect("a nibble is a digit: this is a bug"));
        key.push(char::from_digit(u32::from(byte & 15), 16).expect("a nibble is a digit: this is a bug"));
    }
    key
}
