//! The caller behind balancers that speak HTTP: `Forwarded` (RFC 7239).
//!
//! Each hop appends where it got the request from. What stands left of the first hop that is no balancer of ours was
//! written by that hop, and is not looked at. So the field is read from its end, and whatever a caller has written, such
//! as a quotation mark that it never closes, changes nothing about what was appended to it.

use std::{
    iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use hyper::{HeaderMap, header};

/// Who has sent a request that came from `balancer`: the last hop that is no balancer itself. The `balancer`, when there
/// is none, or when that hop is not named by its address.
pub(crate) fn caller(headers: &HeaderMap, balancer: IpAddr, is_balancer: impl Fn(IpAddr) -> bool) -> IpAddr {
    let fields = headers.get_all(header::FORWARDED).iter().rev();
    let elements = fields.flat_map(|field| parts(field.as_bytes(), b','));
    // A list may have empty elements (RFC 9110 §5.6.1.2).
    for element in elements.filter(|element| !element.trim_ascii().is_empty()) {
        match hop(element) {
            Some(address) if is_balancer(address) => {}
            Some(address) => return address,
            None => break,
        }
    }
    balancer
}

/// What stands between separators, the last part first. In quotation marks a separator is none (RFC 9110 §5.6.4).
fn parts(text: &[u8], separator: u8) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    iter::from_fn(move || {
        let text = rest?;
        let mut is_quoted = false;
        for (at, &byte) in text.iter().enumerate().rev() {
            if byte == b'"' && !(is_quoted && is_escaped(text, at)) {
                is_quoted = !is_quoted;
            } else if byte == separator && !is_quoted {
                rest = Some(&text[..at]);
                return Some(&text[at + 1..]);
            }
        }
        rest.take()
    })
}

fn is_escaped(text: &[u8], at: usize) -> bool {
    text[..at].iter().rev().take_while(|&&byte| byte == b'\\').count() % 2 == 1
}

/// The address in the `for` of an element (§4, §5.2), if it is one: not `unknown`, and no name of the balancer's own.
fn hop(element: &[u8]) -> Option<IpAddr> {
    let mut nodes = parts(element, b';').filter_map(|pair| {
        let (name, node) = str::from_utf8(pair).ok()?.split_once('=')?;
        name.trim().eq_ignore_ascii_case("for").then_some(node.trim())
    });
    let node = nodes.next()?;
    // "Each parameter MUST NOT occur more than once."
    if nodes.next().is_some() {
        return None;
    }
    let node = node.strip_prefix('"').map_or(Some(node), |node| node.strip_suffix('"'))?;
    let (address, port): (IpAddr, _) = if let Some(node) = node.strip_prefix('[') {
        let (address, port) = node.split_once(']')?;
        (address.parse::<Ipv6Addr>().ok()?.into(), port)
    } else {
        let (address, port) = node.split_at(node.find(':').unwrap_or(node.len()));
        (address.parse::<Ipv4Addr>().ok()?.into(), port)
    };
    is_port(port).then(|| address.to_canonical())
}

/// Whether it is nothing, or a colon and a port or a name for one (§6.3).
fn is_port(text: &str) -> bool {
    let is_of_port = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    text.is_empty()
        || text.strip_prefix(':').is_some_and(|port| !port.is_empty() && port.bytes().all(is_of_port))
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::random::Rng;
    use hyper::header::HeaderValue;

    use super::*;

    /// The balancer that the request comes from; all of 10.0.0.0/8 and `fd00::/8` are balancers.
    const BALANCER: &str = "10.0.0.1";

    fn is_balancer(address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address.octets()[0] == 10,
            IpAddr::V6(address) => address.octets()[0] == 0xfd,
        }
    }

    fn of(fields: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(header::FORWARDED, HeaderValue::from_bytes(field.as_bytes()).unwrap());
        }
        caller(&headers, BALANCER.parse().unwrap(), is_balancer).to_string()
    }

    #[test]
    fn the_caller_is_the_last_hop_that_is_no_balancer() {
        for (field, caller) in [
            ("for=192.0.2.7", "192.0.2.7"),
            ("For=192.0.2.7", "192.0.2.7"),
            ("for=\"192.0.2.7\"", "192.0.2.7"),
            ("for=\"192.0.2.7:4711\"", "192.0.2.7"),
            ("for=192.0.2.7:4711", "192.0.2.7"),
            ("for=\"192.0.2.7:_x\"", "192.0.2.7"),
            ("for=\"[2001:db8::7]\"", "2001:db8::7"),
            ("for=\"[2001:DB8::7]:4711\"", "2001:db8::7"),
            ("for=\"[::ffff:192.0.2.7]\"", "192.0.2.7"),
            ("by=10.0.0.1;for=192.0.2.7;proto=https;host=a.example", "192.0.2.7"),
            (" proto=https ; for=192.0.2.7 ; ", "192.0.2.7"),
            ("for=192.0.2.7;host=\"a,b;for=198.51.100.9\"", "192.0.2.7"),
            ("for=192.0.2.7;host=\"a\\\",for=198.51.100.9;x=\\\"\"", "192.0.2.7"),
            ("host=\"a\\\\\";for=192.0.2.7", "192.0.2.7"),
            ("for=192.0.2.7, for=10.0.0.2", "192.0.2.7"),
            ("for=192.0.2.7,for=10.0.0.2,for=\"[fd00::1]\", for=10.9.9.9", "192.0.2.7"),
            ("for=192.0.2.7, , ,", "192.0.2.7"),
        ] {
            assert_eq!(of(&[field]), caller, "{field}");
        }
        assert_eq!(of(&["for=198.51.100.9", "for=192.0.2.7", "for=10.0.0.2"]), "192.0.2.7", "several fields");
    }

    #[test]
    fn who_is_not_named_by_an_address_is_the_balancer() {
        for field in [
            "",
            ",",
            "for",
            "for=",
            "for=\"",
            "for=\"\"",
            "for=unknown",
            "for=Unknown",
            "for=_hidden",
            "for=\"_hidden:_port\"",
            "for=localhost",
            "for=192.0.2",
            "for=192.0.2.256",
            "for=192.0.2.07",
            "for=192.0.2.7:",
            "for=\"192.0.2.7:80 \"",
            "for=\"192.0.2.7",
            "for=\"[192.0.2.7]\"",
            "for=2001:db8::7",
            "for=\"[2001:db8::7\"",
            "for=\"[2001:db8::7]80\"",
            "for=\"[fe80::1%eth0]\"",
            "for=192.0.2.7;for=198.51.100.9",
            "by=192.0.2.7;proto=https",
            "xfor=192.0.2.7",
            "for=10.0.0.2",
            "for=10.0.0.2, for=10.0.0.3",
            "for=192.0.2.7, for=unknown",
            "for=192.0.2.7, proto=https",
            "for=192.0.2.7, for=_hidden, for=10.0.0.2",
            "for=\u{e9}",
        ] {
            assert_eq!(of(&[field]), BALANCER, "{field}");
        }
        assert_eq!(of(&[]), BALANCER);
    }

    // Whatever a caller sends, in the field and as the name of the host that the balancer quotes: after balancers have
    // appended what they saw, the caller is where the first of them saw it.
    #[test]
    fn nothing_that_a_caller_writes_changes_what_is_appended() {
        const WORDS: [&str; 16] = [
            "for=",
            "198.51.100.9",
            "10.0.0.2",
            "\"",
            "\\",
            "\\\"",
            ",",
            ";",
            " ",
            "[2001:db8::9]",
            "host=",
            "unknown",
            "=",
            ":80",
            "for=198.51.100.9",
            "\\\\",
        ];
        let mut rng = Rng(7);
        let mut words = |most: u64| -> String {
            let count = rng.between(0, most);
            (0..count).map(|_| WORDS[rng.below(16)]).collect()
        };
        for round in 0..20_000 {
            let (field, host) = (words(12), words(8).replace('\\', "\\\\").replace('"', "\\\""));
            let hops = match round % 4 {
                0 => "for=192.0.2.7".to_owned(),
                1 => format!("for=192.0.2.7;host=\"{host}\""),
                2 => format!("host=\"{host}\";for=\"192.0.2.7:4711\";proto=https"),
                _ => format!("host=\"{host}\";for=192.0.2.7, for=10.0.0.2;host=\"{host}\""),
            };
            assert_eq!(of(&[&format!("{field}, {hops}")]), "192.0.2.7", "{field}, {hops}");
            assert_eq!(of(&[&field, &hops]), "192.0.2.7", "{field} and {hops}");
        }
    }
}
