//! Who may share cached work with whom.
//!
//! A tenant is an API key together with the `cache_salt` of a request. Its [`CacheSalt`] is a keyed
//! hash under a key drawn at start, so that nobody can choose a salt that equals another tenant's;
//! 128 bits, because two tenants with one salt could time each other's prompts.

use std::hash::Hasher as _;

use siphasher::sip128::{Hasher128 as _, SipHasher13};
use tandem_engine::CacheSalt;

pub(super) struct Tenants {
    hasher: SipHasher13,
}

impl Tenants {
    pub(super) fn new() -> Self {
        Tenants { hasher: SipHasher13::new_with_key(&rand::random()) }
    }

    /// `api_key`: as the client sent it; `None` where none is needed.
    pub(super) fn salt(&self, api_key: Option<&[u8]>, cache_salt: Option<&str>) -> CacheSalt {
        let mut hasher = self.hasher;
        for part in [api_key, cache_salt.map(str::as_bytes)] {
            // The length makes the parts distinguishable; nothing is as long as "absent".
            hasher.write_u64(part.map_or(u64::MAX, |part| part.len() as u64));
            hasher.write(part.unwrap_or_default());
        }
        CacheSalt(hasher.finish128().as_u128())
    }
}

#[cfg(test)]
mod tests {
    use super::Tenants;

    #[test]
    fn every_pair_of_key_and_salt_is_a_tenant_of_its_own() {
        let tenants = Tenants::new();
        let pairs: [(Option<&[u8]>, Option<&str>); 9] = [
            (None, None),
            (None, Some("")),
            (Some(b""), None),
            (None, Some("ab")),
            (Some(b"ab"), None),
            (Some(b"a"), Some("b")),
            (Some(b"b"), Some("a")),
            (Some(b"ab"), Some("")),
            (Some(b""), Some("ab")),
        ];
        for (i, (key, salt)) in pairs.into_iter().enumerate() {
            for (j, (other_key, other_salt)) in pairs.into_iter().enumerate() {
                let is_equal = tenants.salt(key, salt) == tenants.salt(other_key, other_salt);
                assert_eq!(is_equal, i == j, "{i} and {j}");
            }
        }
        assert_ne!(tenants.salt(None, None), Tenants::new().salt(None, None), "a new key at each start");
    }
}
