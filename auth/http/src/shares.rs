//! How many of something one caller may have at once.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Counts what each caller has, so that none takes what is there for all. Cheap to clone; clones count together.
#[derive(Debug)]
pub struct Shares<K> {
    most: usize,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K> Clone for Shares<K> {
    fn clone(&self) -> Self {
        Self { most: self.most, held: self.held.clone() }
    }
}

impl<K: Eq + Hash + Clone> Shares<K> {
    /// At most `most` for each caller.
    pub fn new(most: usize) -> Self {
        Self { most, held: Arc::default() }
    }

    /// One more for `caller`, until it is dropped; `None` when it has as many as it may.
    pub fn take(&self, caller: K) -> Option<Share<K>> {
        let mut held = lock(&self.held);
        let count = held.entry(caller.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Share { caller, count: 1, held: self.held.clone() })
    }

    /// So many more for `caller`, whatever it has, until they are dropped.
    pub fn add(&self, caller: K, count: usize) -> Share<K> {
        *lock(&self.held).entry(caller.clone()).or_default() += count;
        Share { caller, count, held: self.held.clone() }
    }

    /// How many a caller may have.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Whether `caller` may have one more.
    pub fn has_room(&self, caller: &K) -> bool {
        lock(&self.held).get(caller).is_none_or(|count| *count < self.most)
    }
}

/// One that a caller has, or several.
#[derive(Debug)]
pub struct Share<K: Eq + Hash> {
    caller: K,
    count: usize,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut held = lock(&self.held);
        if let Some(count) = held.get_mut(&self.caller) {
            *count -= self.count;
            if *count == 0 {
                held.remove(&self.caller);
            }
        }
    }
}

fn lock<K>(held: &Mutex<HashMap<K, usize>>) -> MutexGuard<'_, HashMap<K, usize>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_leaves_makes_room_and_is_forgotten() {
        let shares = Shares::new(2);
        let (first, second) = (shares.take('a'), shares.take('a'));
        assert!(first.is_some() && second.is_some() && shares.take('a').is_none());
        assert!(shares.take('b').is_some());
        assert!(!shares.has_room(&'a') && shares.has_room(&'b'));
        drop((shares.add('a', 1), first));
        assert!(shares.has_room(&'a'));
        let third = shares.take('a');
        assert!(third.is_some());
        drop((second, third));
        assert!(lock(&shares.held).is_empty());
    }
}
