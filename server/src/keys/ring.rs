//! The keys that requests are checked against, and what each has used.
//!
//! Checking a key costs a hash and a look-up, whatever the number of keys; spending costs a short lock
//! of the key's own. A key's windows are counted here and written down by the [`super::Keeper`].

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use siphasher::sip128::SipHasher13;
use subtle::ConstantTimeEq as _;

use super::file::KeyEntry;
use super::rules::{Budget, KeyRules};
use super::{KeyHash, hash};

/// What was used of a key. Windows are named by their beginning, in seconds since the epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// The window that `requests` belongs to.
    pub requests_window: u64,
    /// Requests in it.
    pub requests: u64,
    /// The window that `tokens` belongs to.
    pub tokens_window: u64,
    /// Tokens in it.
    pub tokens: u64,
    /// Requests ever.
    pub total_requests: u64,
    /// Tokens ever.
    pub total_tokens: u64,
    /// Seconds since the epoch; 0: never.
    pub last_used_at: u64,
}

/// Who sent a request, as its key says.
pub struct Client {
    /// The key's name in the file; `None` for one from the settings.
    name: Option<String>,
    id: i64,
    hash: KeyHash,
    rules: KeyRules,
    /// Shared with the client that stands for the same key after a change of the file.
    account: Arc<Mutex<Account>>,
}

#[derive(Default)]
struct Account {
    used: Used,
    /// There is something to write down.
    is_dirty: bool,
    /// Requests refused since the start, for a spent budget of requests or of tokens.
    num_refused: [u64; 2],
}

/// What was used of a key, for metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyUse {
    /// Its number; 0 of keys from the settings.
    pub id: i64,
    /// Its name; `None` of keys from the settings.
    pub name: Option<String>,
    /// Requests ever.
    pub num_requests: u64,
    /// Tokens ever.
    pub num_tokens: u64,
    /// Requests refused since the start, for a spent budget of requests or of tokens.
    pub num_refused: [u64; 2],
    /// What is left of the budgets of requests and tokens, if it has them.
    pub left: [Option<u64>; 2],
}

impl KeyUse {
    /// Counts both as one, which has no budget.
    pub fn add(&mut self, other: &KeyUse) {
        self.num_requests += other.num_requests;
        self.num_tokens += other.num_tokens;
        for (sum, count) in self.num_refused.iter_mut().zip(other.num_refused) {
            *sum += count;
        }
        self.left = [None; 2];
    }
}

/// How a client stands with one of its budgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Most in a window.
    pub limit: u64,
    /// Left in this one.
    pub remaining: u64,
    /// Seconds until the next one; at least 1.
    pub reset: u64,
}

/// Why a request is not let in now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The budget of requests is spent.
    Requests(Standing),
    /// The budget of tokens is spent, or what is left does not hold so many.
    Tokens(Standing),
}

impl Client {
    /// Its name, for people.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Its number in the file; 0 of keys from the settings.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// What it may do.
    pub fn rules(&self) -> &KeyRules {
        &self.rules
    }

    /// Counts one more request.
    ///
    /// # Errors
    /// If the budget of requests or of tokens is spent; nothing is counted then.
    pub fn admit(&self, now: u64) -> Result<(), Refusal> {
        let mut account = self.account(now);
        if let Some(budget) = self.rules.tokens {
            let standing = standing(budget, account.used.tokens, now);
            if standing.remaining == 0 {
                account.num_refused[1] += 1;
                return Err(Refusal::Tokens(standing));
            }
        }
        if let Some(budget) = self.rules.requests {
            let standing = standing(budget, account.used.requests, now);
            if standing.remaining == 0 {
                account.num_refused[0] += 1;
                return Err(Refusal::Requests(standing));
            }
        }
        account.used.requests += 1;
        account.used.total_requests += 1;
        account.used.last_used_at = now;
        account.is_dirty = true;
        Ok(())
    }

    /// Spends a prompt's tokens.
    ///
    /// # Errors
    /// If there are fewer left; nothing is spent then.
    pub fn spend_prompt(&self, num_tokens: u64, now: u64) -> Result<(), Refusal> {
        let mut account = self.account(now);
        if let Some(budget) = self.rules.tokens {
            let standing = standing(budget, account.used.tokens, now);
            if standing.remaining < num_tokens {
                account.num_refused[1] += 1;
                return Err(Refusal::Tokens(standing));
            }
        }
        account.spend(num_tokens);
        Ok(())
    }

    /// Spends an answer's tokens, which are there: the budget may be overdrawn by those of running answers.
    pub fn spend_output(&self, num_tokens: u64, now: u64) {
        self.account(now).spend(num_tokens);
    }

    /// How it stands with its budgets of requests and tokens.
    pub fn standings(&self, now: u64) -> (Option<Standing>, Option<Standing>) {
        let account = self.account(now);
        let of = |budget: Option<Budget>, used| budget.map(|budget| standing(budget, used, now));
        (of(self.rules.requests, account.used.requests), of(self.rules.tokens, account.used.tokens))
    }

    fn is_valid(&self, now: u64) -> bool {
        self.rules.expires_at.is_none_or(|end| now < end)
    }

    /// The account, in the windows of `now`.
    fn account(&self, now: u64) -> MutexGuard<'_, Account> {
        let mut account = self.account.lock().expect("no holder of this lock panics: this is a bug");
        let used = &mut account.used;
        if let Some(budget) = self.rules.requests {
            roll(budget, now, &mut used.requests_window, &mut used.requests);
        }
        if let Some(budget) = self.rules.tokens {
            roll(budget, now, &mut used.tokens_window, &mut used.tokens);
        }
        account
    }
}

impl Account {
    fn spend(&mut self, num_tokens: u64) {
        self.used.tokens += num_tokens;
        self.used.total_tokens += num_tokens;
        self.is_dirty = true;
    }
}

/// Begins a new window if `now` is not in the present one.
fn roll(budget: Budget, now: u64, window: &mut u64, used: &mut u64) {
    let (start, _) = budget.window_at(now);
    if *window != start {
        *window = start;
        *used = 0;
    }
}

fn standing(budget: Budget, used: u64, now: u64) -> Standing {
    let (_, end) = budget.window_at(now);
    Standing {
        limit: budget.amount,
        remaining: budget.amount.saturating_sub(used),
        reset: end.saturating_sub(now).max(1),
    }
}

/// All keys. Without any, and without a file of keys, everybody is let in.
pub struct Keyring {
    is_open: bool,
    /// Drawn at start: nobody outside can tell where a key is looked for.
    hasher: SipHasher13,
    fixed: Vec<Arc<Client>>,
    clients: RwLock<HashMap<u128, Arc<Client>>>,
}

impl Keyring {
    /// A ring of these keys, which may do everything. `has_file`: more will come from a file, and nobody is
    /// let in without a key even while there is none.
    pub fn new(keys: &[String], has_file: bool) -> Self {
        let client = |key: &String| {
            Arc::new(Client {
                name: None,
                id: 0,
                hash: hash(key.as_bytes()),
                rules: KeyRules::default(),
                account: Arc::default(),
            })
        };
        let ring = Keyring {
            is_open: keys.is_empty() && !has_file,
            hasher: SipHasher13::new_with_key(&rand::random()),
            fixed: keys.iter().map(client).collect(),
            clients: RwLock::default(),
        };
        ring.replace(&[]);
        ring
    }

    /// True if no key is needed.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Whose key this is, if it is valid now.
    pub fn find(&self, key: &[u8], now: u64) -> Option<Arc<Client>> {
        let hash = hash(key);
        let clients = self.clients.read().expect("no holder of this lock panics: this is a bug");
        // Where it is looked for follows from a keyed hash, so timing says nothing about other keys; what is
        // found is compared whole.
        let client = clients.get(&self.place(&hash))?;
        (bool::from(client.hash.ct_eq(&hash)) && client.is_valid(now)).then(|| client.clone())
    }

    /// Takes the file's keys for those there are. What was used of a key stays, or is what the file says if
    /// the key is new.
    pub(super) fn replace(&self, entries: &[KeyEntry]) {
        let mut clients = self.clients.write().expect("no holder of this lock panics: this is a bug");
        let mut new: HashMap<u128, Arc<Client>> = HashMap::new();
        for entry in entries.iter().filter(|entry| entry.revoked_at.is_none()) {
            let place = self.place(&entry.hash);
            let account = match clients.get(&place) {
                Some(known) => known.account.clone(),
                None => Arc::new(Mutex::new(Account { used: entry.used, ..Account::default() })),
            };
            let client = Client {
                name: Some(entry.name.clone()),
                id: entry.id,
                hash: entry.hash,
                rules: entry.rules.clone(),
                account,
            };
            new.insert(place, Arc::new(client));
        }
        for client in &self.fixed {
            new.insert(self.place(&client.hash), client.clone());
        }
        *clients = new;
    }

    /// What has been used since the last call, of keys from the file.
    pub(super) fn take_used(&self) -> Vec<(i64, Used)> {
        let clients = self.clients.read().expect("no holder of this lock panics: this is a bug");
        let mut used = Vec::new();
        for client in clients.values().filter(|client| client.name.is_some()) {
            let mut account = client.account.lock().expect("no holder of this lock panics: this is a bug");
            if std::mem::take(&mut account.is_dirty) {
                used.push((client.id, account.used));
            }
        }
        used
    }

    /// Says again what [`Keyring::take_used`] gave, as it could not be written down.
    pub(super) fn give_back(&self, used: &[(i64, Used)]) {
        let clients = self.clients.read().expect("no holder of this lock panics: this is a bug");
        let is_given =
            |client: &&Arc<Client>| client.name.is_some() && used.iter().any(|(id, _)| *id == client.id);
        for client in clients.values().filter(is_given) {
            client.account.lock().expect("no holder of this lock panics: this is a bug").is_dirty = true;
        }
    }

    /// What was used of every key, by number; those from the settings are one.
    pub fn uses(&self, now: u64) -> Vec<KeyUse> {
        let clients = self.clients.read().expect("no holder of this lock panics: this is a bug");
        let mut uses: BTreeMap<i64, KeyUse> = BTreeMap::new();
        for client in clients.values() {
            let (requests, tokens) = client.standings(now);
            let account = client.account(now);
            let used = KeyUse {
                id: client.id,
                name: client.name.clone(),
                num_requests: account.used.total_requests,
                num_tokens: account.used.total_tokens,
                num_refused: account.num_refused,
                left: [requests, tokens].map(|standing| standing.map(|standing| standing.remaining)),
            };
            match uses.get_mut(&client.id) {
                Some(known) => known.add(&used),
                None => drop(uses.insert(client.id, used)),
            }
        }
        uses.into_values().collect()
    }

    fn place(&self, hash: &KeyHash) -> u128 {
        self.hasher.hash(hash).as_u128()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::rules::Lanes;

    fn entry(key: &str, rules: KeyRules) -> KeyEntry {
        KeyEntry {
            id: 1,
            name: "team".to_owned(),
            hint: String::new(),
            rules,
            created_at: 0,
            revoked_at: None,
            used: Used::default(),
            hash: hash(key.as_bytes()),
        }
    }

    fn rules(requests: Option<Budget>, tokens: Option<Budget>) -> KeyRules {
        KeyRules { requests, tokens, ..KeyRules::default() }
    }

    #[test]
    fn a_spent_budget_refuses_until_its_window_ends() {
        let ring = Keyring::new(&[], true);
        let budget = |amount| Some(Budget { amount, window: 60 });
        ring.replace(&[entry("k", rules(budget(2), budget(100)))]);
        let client = ring.find(b"k", 0).expect("it is known");
        assert_eq!(client.admit(61), Ok(()));
        assert_eq!(client.admit(62), Ok(()));
        let spent = Standing { limit: 2, remaining: 0, reset: 50 };
        assert_eq!(client.admit(70), Err(Refusal::Requests(spent)));
        assert_eq!(client.admit(120), Ok(()), "a new window");

        let left = Standing { limit: 100, remaining: 100, reset: 60 };
        assert_eq!(client.spend_prompt(101, 120), Err(Refusal::Tokens(left)));
        assert_eq!(client.spend_prompt(90, 120), Ok(()));
        client.spend_output(30, 121);
        let spent = Standing { limit: 100, remaining: 0, reset: 58 };
        assert_eq!(client.standings(122).1, Some(spent), "a running answer may overdraw");
        assert_eq!(client.admit(122), Err(Refusal::Tokens(spent)));
    }

    #[test]
    fn what_was_used_outlives_a_change_of_the_file() {
        let ring = Keyring::new(&[], true);
        ring.replace(&[entry("k", rules(Some(Budget { amount: 2, window: 60 }), None))]);
        let before = ring.find(b"k", 0).expect("known");
        before.admit(1).expect("within the budget");
        assert_eq!(ring.take_used().len(), 1);
        assert!(ring.take_used().is_empty(), "written down once");
        ring.replace(&[entry("k", rules(Some(Budget { amount: 1, window: 60 }), None))]);
        let after = ring.find(b"k", 0).expect("known");
        assert!(matches!(after.admit(2), Err(Refusal::Requests(_))), "the new limit, the old count");
        ring.replace(&[]);
        assert!(ring.find(b"k", 0).is_none());
    }

    #[test]
    fn a_ring_is_open_only_without_keys_and_without_a_file() {
        assert!(Keyring::new(&[], false).is_open());
        assert!(!Keyring::new(&[], true).is_open());
        let ring = Keyring::new(&["a".to_owned()], false);
        assert!(!ring.is_open());
        let client = ring.find(b"a", u64::MAX).expect("known");
        assert_eq!((client.name(), client.rules().lanes), (None, Lanes::ALL));
        assert!(ring.find(b"", 0).is_none() && ring.find(b"ab", 0).is_none());
    }

    #[test]
    fn what_could_not_be_written_is_said_again() {
        let ring = Keyring::new(&["fixed".to_owned()], true);
        ring.replace(&[entry("k", KeyRules::default())]);
        ring.find(b"k", 0).expect("known").admit(1).expect("no budget");
        let used = ring.take_used();
        assert!(used.len() == 1 && ring.take_used().is_empty());
        ring.give_back(&used);
        assert_eq!(ring.take_used(), used);
    }

    #[test]
    fn uses_are_counted_by_number() {
        let ring = Keyring::new(&["a".to_owned(), "b".to_owned()], true);
        let budget = Some(Budget { amount: 2, window: 60 });
        ring.replace(&[entry("k", rules(budget, budget))]);
        for key in [b"a", b"b", b"k"] {
            let client = ring.find(key, 0).expect("known");
            client.admit(1).expect("within the budget");
            client.spend_output(2, 1);
            assert_eq!(client.admit(1).is_err(), key == b"k");
        }
        let [settings, file] = ring.uses(1).try_into().expect("two numbers");
        assert_eq!((settings.id, settings.num_requests, settings.num_tokens), (0, 4, 4));
        assert_eq!((settings.name, settings.left), (None, [None, None]));
        assert_eq!((file.name.as_deref(), file.num_requests, file.num_tokens), (Some("team"), 1, 2));
        assert_eq!((file.num_refused, file.left), ([0, 1], [Some(1), Some(0)]));
    }

    #[test]
    fn an_expired_key_opens_nothing() {
        let ring = Keyring::new(&[], true);
        ring.replace(&[entry("k", KeyRules { expires_at: Some(10), ..KeyRules::default() })]);
        assert!(ring.find(b"k", 9).is_some() && ring.find(b"k", 10).is_none());
    }
}
