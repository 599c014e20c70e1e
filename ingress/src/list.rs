//! Lists and parameters in header fields, whose quoted strings may hold what separates elsewhere.

/// The parts of `text` between the separators that stand in no quoted string (RFC 9110 §5.6.4).
pub(crate) fn split(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |c| {
        let was_escaped = std::mem::replace(&mut escaped, false);
        match c {
            '\\' if quoted => escaped = !was_escaped,
            '"' => quoted ^= !was_escaped,
            _ => {}
        }
        c == separator && !quoted
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_quoted_does_not_separate() {
        let parts = |text| split(text, ',').collect::<Vec<_>>();
        assert_eq!(parts("a,b"), ["a", "b"]);
        assert_eq!(parts(""), [""]);
        assert_eq!(parts(r#"a="x,y",b"#), [r#"a="x,y""#, "b"]);
        assert_eq!(parts(r#"a="x\",y",b"#), [r#"a="x\",y""#, "b"]);
        assert_eq!(parts(r#"a="x\\",y"#), [r#"a="x\\""#, "y"]);
        assert_eq!(parts(r#"a\,b="x,"#), [r"a\", r#"b="x,"#]);
    }
}
