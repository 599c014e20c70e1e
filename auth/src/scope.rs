//! What a token may be used for: scopes in the syntax of SMART App Launch 2.2 (`system/DiagnosticReport.crds`).

/// One thing that a scope permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Submitting images.
    Submit,
    /// Reading one's own jobs and reports.
    Read,
    /// Cancelling one's own jobs and removing their results.
    Delete,
    /// Listing one's own jobs.
    Search,
    /// The operators' API.
    Operate,
    /// Reading an event of the audit trail.
    ReadTrail,
    /// Searching the audit trail.
    SearchTrail,
    /// The registration service.
    Administer,
}

impl Permission {
    /// The scope's resource, and its letter: SMART's create, read, delete, search.
    fn parts(self) -> (&'static str, Option<char>) {
        match self {
            Self::Submit => ("system/DiagnosticReport", Some('c')),
            Self::Read => ("system/DiagnosticReport", Some('r')),
            Self::Delete => ("system/DiagnosticReport", Some('d')),
            Self::Search => ("system/DiagnosticReport", Some('s')),
            Self::Operate => ("dermflow/operate", None),
            Self::ReadTrail => ("system/AuditEvent", Some('r')),
            Self::SearchTrail => ("system/AuditEvent", Some('s')),
            Self::Administer => ("dermflow/register", None),
        }
    }

    /// Whether `scope`, a list separated by spaces (RFC 6749 §3.3), permits it.
    pub fn is_in(self, scope: &str) -> bool {
        let (resource, letter) = self.parts();
        scope.split(' ').any(|granted| match letter {
            None => granted == resource,
            Some(letter) => matches!(granted.split_once('.'), Some((name, letters))
                if name == resource && letters.contains(letter)),
        })
    }
}

/// The part of `granted` that was asked for; all of it when nothing in particular was. `None` when something was
/// asked for that is not granted (RFC 6749 §3.3, `invalid_scope`), or is no scope at all.
pub fn narrow(granted: &str, asked: Option<&str>) -> Option<String> {
    let Some(asked) = asked.filter(|asked| !asked.trim().is_empty()) else { return Some(granted.into()) };
    let covered = |one: &str| {
        granted.split(' ').any(|granted| match (one.split_once('.'), granted.split_once('.')) {
            (Some((name, letters)), Some((resource, allowed))) => {
                name == resource
                    && in_order(letters)
                    && letters.chars().all(|letter| allowed.contains(letter))
            }
            _ => one == granted,
        })
    };
    asked.split(' ').all(covered).then(|| asked.into())
}

/// SMART wants the letters in this order, each once.
fn in_order(letters: &str) -> bool {
    let mut rest = "cruds".chars();
    !letters.is_empty() && letters.chars().all(|letter| rest.any(|next| next == letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "system/DiagnosticReport.crds";

    #[test]
    fn a_permission_is_in_a_scope_that_has_its_letter() {
        assert!(Permission::Submit.is_in(ALL) && Permission::Delete.is_in(ALL));
        assert!(!Permission::Delete.is_in("system/DiagnosticReport.crs"));
        assert!(!Permission::Submit.is_in("system/AuditEvent.crs"));
        assert!(!Permission::Operate.is_in(ALL));
        assert!(Permission::Operate.is_in("a dermflow/operate"));
        assert!(!Permission::Read.is_in("system/DiagnosticReport") && !Permission::Read.is_in(""));
    }

    #[test]
    fn less_may_be_asked_for_and_never_more() {
        assert_eq!(narrow(ALL, None).as_deref(), Some(ALL));
        let less = "system/DiagnosticReport.rs";
        assert_eq!(narrow(ALL, Some(less)).as_deref(), Some(less));
        for more in [
            "system/DiagnosticReport.cruds",
            "dermflow/operate",
            "system/*.rs",
            "system/DiagnosticReport.sr",
            "a  b",
        ] {
            assert_eq!(narrow(ALL, Some(more)), None, "{more}");
        }
    }
}
