//! The only place that reads the wall clock; everything else is handed an instant.

use time::OffsetDateTime;

/// The current time in UTC, cut to milliseconds: the precision of FHIR instants and of every record here.
#[expect(clippy::disallowed_methods, reason = "this is the one wrapper")]
pub fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_millisecond(now.millisecond()).unwrap_or(now)
}

/// Milliseconds from `start` to `end`; 0 when the clock stepped back.
pub fn elapsed_ms(start: OffsetDateTime, end: OffsetDateTime) -> u64 {
    u64::try_from((end - start).whole_milliseconds()).unwrap_or(0)
}
