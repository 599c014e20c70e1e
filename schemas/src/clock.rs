//! The only place that reads the wall clock; everything else is handed an instant.

use std::sync::atomic::{AtomicI64, Ordering};

use time::{
    Duration, OffsetDateTime, PrimitiveDateTime, UtcOffset, format_description::BorrowedFormatItem,
    macros::format_description,
};

use crate::limits::CLOCK_TOLERANCE;

/// Milliseconds that the machine's clock is behind the one that [`follow`] was told of.
static BEHIND: AtomicI64 = AtomicI64::new(0);

const NAME: &[BorrowedFormatItem<'_>] = format_description!("[year][month][day]T[hour][minute][second]Z");

/// The moment that a name such as `20260131T235959Z` says.
pub fn moment(name: &str) -> Option<OffsetDateTime> {
    PrimitiveDateTime::parse(name, NAME).ok().map(PrimitiveDateTime::assume_utc)
}

/// The name of a moment, to the second; of a year that has four digits.
///
/// # Errors
/// When the year has more.
pub fn name(moment: OffsetDateTime) -> Result<String, time::error::Format> {
    moment.to_offset(UtcOffset::UTC).format(NAME)
}

/// The current time in UTC, cut to milliseconds: the precision of FHIR instants and of every record here. By the
/// machine's clock, corrected by what [`follow`] was told.
pub fn now() -> OffsetDateTime {
    let now = machine() + Duration::milliseconds(BEHIND.load(Ordering::Relaxed));
    now.replace_millisecond(now.millisecond()).unwrap_or(now)
}

#[expect(clippy::disallowed_methods, reason = "this is the one wrapper")]
fn machine() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// From now on this process goes by another clock, which shows `reference` at this moment. A difference within
/// [`CLOCK_TOLERANCE`] is left alone: it is the way between the two, not the clocks. Returns how many seconds the
/// machine's clock is behind.
pub fn follow(reference: OffsetDateTime) -> f64 {
    let behind = reference - machine();
    let corrected = if behind.abs() > CLOCK_TOLERANCE { behind } else { Duration::ZERO };
    BEHIND.store(i64::try_from(corrected.whole_milliseconds()).unwrap_or(0), Ordering::Relaxed);
    behind.as_seconds_f64()
}

/// Milliseconds from `start` to `end`; 0 when the clock stepped back.
pub fn elapsed_ms(start: OffsetDateTime, end: OffsetDateTime) -> u64 {
    u64::try_from((end - start).whole_milliseconds()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, as the correction is the whole process's.
    #[test]
    fn a_wrong_clock_is_corrected_and_a_right_one_left_alone() {
        let hour = Duration::hours(1);
        for off in [hour, -hour] {
            assert!((follow(machine() + off) - off.as_seconds_f64()).abs() < 1.0);
            assert!((now() - machine() - off).abs() < Duration::seconds(1));
        }
        follow(machine() + CLOCK_TOLERANCE / 2);
        assert!((now() - machine()).abs() < CLOCK_TOLERANCE / 4);
    }
}
