//! What has to hold for any input: a target a parser, each of which panics when it does not.
//!
//! The fuzzer (`tests/fuzz/run`) looks for an input that makes one panic, and every test run tries the inputs of the
//! corpus.

use std::{
    net::IpAddr,
    panic::{self, UnwindSafe},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use dermflow_http::fuzz as http;
use dermflow_ingress::fuzz as ingress;
use dermflow_schemas::{
    envelope::{JobHeader, Payload, ResultHeader},
    error::{ApiError, Code},
    image::{self, Format, ImageBytes, ImageFault},
    limits::{MAX_FAULTS, MAX_IMAGES, MAX_NAME_BYTES, MAX_WAIT},
};
use serde_json::Value;

/// How long a target may take for an input of a megabyte, in a build that is not optimised, on a busy machine.
const WITHIN: Duration = Duration::from_secs(5);

/// A target's name, and what it does with an input.
type Target = (&'static str, fn(&[u8]));

/// Every target.
pub(crate) const TARGETS: [Target; 12] = [
    ("json", json),
    ("parameters", parameters),
    ("base64", base64),
    ("header", header),
    ("envelope", envelope),
    ("lines", lines),
    ("line", line),
    ("prefer", prefer),
    ("accept", accept),
    ("forwarded", forwarded),
    ("proxy", proxy),
    ("form", form),
];

/// Runs a target on an input.
pub(crate) fn run((name, target): Target, input: &[u8]) {
    let begun = Instant::now();
    target(input);
    assert!(begun.elapsed() < WITHIN, "{name} takes {:?} for {} bytes", begun.elapsed(), input.len());
}

/// Against `serde_json::Value`, which takes names twice and has no limits: what it refuses is refused, no later in the
/// text, and what it takes is refused for nothing else.
fn json(input: &[u8]) {
    let Some(reference) = reference(input) else { return };
    match (ingress::json(input), reference) {
        (Ok(()), Ok(_)) => {}
        (Ok(()), Err(error)) => panic!("taken, but {error}"),
        (Err(refused), Err(error)) => {
            if refused.code() == Code::JsonMalformed {
                assert!(place(&refused) <= (error.line(), error.column()), "{refused:?}, {error}");
            }
        }
        (Err(refused), Ok(value)) => {
            let limits = has_repeated_name(input, &value) || has_long_name(&value);
            assert!(refused.code() == Code::JsonTooComplex || limits, "{refused:?}");
        }
    }
}

/// How `serde_json` reads a text; `None` when that has a name that means something to `Value`, and nothing to us.
fn reference(input: &[u8]) -> Option<serde_json::Result<Value>> {
    let is_special = input.windows(11).any(|window| window == b"$serde_json");
    (!is_special).then(|| serde_json::from_slice(input))
}

fn place(error: &ApiError) -> (usize, usize) {
    let detail = error.faults[0].detail.as_deref().expect("a place");
    let (line, column) =
        detail.strip_prefix("line ").and_then(|rest| rest.split_once(", column ")).expect("a place");
    (line.parse().expect("a number"), column.parse().expect("a number"))
}

/// A name that stands in an object twice is there once in its value: the texts differ in how many names they have.
fn has_repeated_name(input: &[u8], value: &Value) -> bool {
    fn names(value: &Value) -> usize {
        match value {
            Value::Array(items) => items.iter().map(names).sum(),
            Value::Object(members) => members.len() + members.values().map(names).sum::<usize>(),
            _ => 0,
        }
    }
    let (mut colons, mut quoted, mut escaped) = (0, false, false);
    for byte in input {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b':' if !quoted => colons += 1,
            _ => {}
        }
    }
    colons > names(value)
}

fn has_long_name(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(has_long_name),
        Value::Object(members) => {
            members.iter().any(|(name, value)| name.len() > MAX_NAME_BYTES || has_long_name(value))
        }
        _ => false,
    }
}

fn parameters(input: &[u8]) {
    judge(&ingress::parameters(input), input, "Parameters");
}

fn line(input: &[u8]) {
    let Some((first, rest)) = input.split_first() else { return };
    let is_fhir = first % 2 == 1;
    let (name, payload) = ingress::line(is_fhir, rest);
    judge(&payload, rest, if is_fhir { "Parameters" } else { "" });
    assert!(payload.is_err() || name.is_some(), "a line without a name");
    if let Some(name) = name {
        assert!(!name.is_empty() && !name.chars().any(char::is_control));
    }
}

/// What was taken is a request that goes through the queue unchanged; what was refused has faults where they say.
fn judge(payload: &Result<Payload, ApiError>, body: &[u8], root: &str) {
    match payload {
        Ok(payload) => {
            assert!((1..=MAX_IMAGES).contains(&payload.images.len()));
            for (image, entry) in payload.images.iter().zip(&payload.manifest.images) {
                assert_eq!(image.as_slice().len(), entry.bytes);
                assert_eq!(image::check(image).map(|header| header.format), Ok(entry.format));
            }
            assert_eq!(&Payload::decode(payload.encode()).expect("its own form"), payload);
        }
        Err(error) => {
            assert!((1..=MAX_FAULTS).contains(&error.faults.len()));
            let Some(document) = reference(body) else { return };
            for fault in &error.faults {
                let Some(field) = &fault.field else { continue };
                let path = fhirpath(field).unwrap_or_else(|| panic!("no FHIRPath: {field}"));
                assert!(root.is_empty() || path[0] == Step::Name(root.into()), "{field}");
                let steps = if root.is_empty() { &path[..] } else { &path[1..] };
                let document = document.as_ref().expect("a fault with a place is one of a document");
                assert!(leads_somewhere(document, steps), "{field} is nowhere");
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Name(String),
    Index(usize),
}

/// Names with dots between them, each with any number of indices; a name is an identifier, or stands between backticks
/// (FHIRPath N1, grammar).
fn fhirpath(text: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let mut rest = text;
    loop {
        if let Some(quoted) = rest.strip_prefix('`') {
            let mut name = String::new();
            let mut chars = quoted.char_indices();
            rest = loop {
                match chars.next()? {
                    (at, '`') => break &quoted[at + 1..],
                    (_, '\\') => match chars.next()?.1 {
                        c @ ('`' | '\\') => name.push(c),
                        'u' => {
                            let digits: String = chars.by_ref().take(4).map(|(_, c)| c).collect();
                            name.push(char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?);
                        }
                        _ => return None,
                    },
                    (_, c) if c.is_control() => return None,
                    (_, c) => name.push(c),
                }
            };
            steps.push(Step::Name(name));
        } else {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            let name = &rest[..end];
            let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let keywords = ["and", "or", "xor", "implies", "div", "mod", "true", "false"];
            if !name.starts_with(|c: char| is_word(c) && !c.is_ascii_digit()) || !name.chars().all(is_word) {
                return None;
            }
            if keywords.contains(&name) {
                return None;
            }
            steps.push(Step::Name(name.into()));
            rest = &rest[end..];
        }
        while let Some(index) = rest.strip_prefix('[') {
            let (index, behind) = index.split_once(']')?;
            steps.push(Step::Index(index.parse().ok()?));
            rest = behind;
        }
        if rest.is_empty() {
            return Some(steps);
        }
        rest = rest.strip_prefix('.')?;
    }
}

/// Whether all steps but the last, which may name what is missing, are those of the document.
fn leads_somewhere(document: &Value, steps: &[Step]) -> bool {
    let Some((_, parents)) = steps.split_last() else { return true };
    let step = |value: &Value, step: &Step| -> Option<Value> {
        match step {
            Step::Name(name) => value.get(name).cloned(),
            Step::Index(index) => value.get(index).cloned(),
        }
    };
    parents.iter().try_fold(document.clone(), |value, next| step(&value, next)).is_some()
}

/// Against the `base64` crate; and where the first fault is, told by what is before and at it.
fn base64(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    match (image::decode_base64(text), STANDARD.decode(text)) {
        (Ok(ours), Ok(theirs)) => assert_eq!(ours.as_slice(), theirs),
        (Err(ImageFault::NotBase64(at)), Err(_)) => {
            let is_symbol = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/".contains(byte);
            let (before, from) = text.as_bytes().split_at(at);
            assert!(
                before.iter().all(|byte| is_symbol(byte) || at == text.len() && *byte == b'='),
                "{text:?} {at}"
            );
            match from {
                [] => assert!(!text.len().is_multiple_of(4), "{text:?}"),
                [first, rest @ ..] if is_symbol(first) => {
                    assert!(rest.len() <= 2 && rest.iter().all(|byte| *byte == b'='), "{text:?} {at}");
                }
                _ => {}
            }
        }
        (ours, theirs) => panic!("{text:?}: {ours:?}, {theirs:?}"),
    }
    let encoded = STANDARD.encode(input);
    assert_eq!(image::decode_base64(&encoded).expect("its own form").as_slice(), input);
    if !encoded.is_empty() {
        let at = input.len() % encoded.len();
        let spoiled = format!("{}!{}", &encoded[..at], &encoded[at..]);
        assert!(matches!(image::decode_base64(&spoiled), Err(ImageFault::NotBase64(found)) if found <= at));
    }
}

/// Against the decoders: what they decode has the size that was read of it.
fn header(input: &[u8]) {
    /// What is decoded is no larger, in pixels.
    const LARGEST: u64 = 1 << 20;
    let checked = image::check(&ImageBytes::from(input.to_vec()));
    let format = match input {
        [0xff, 0xd8, 0xff, ..] => Format::Jpeg,
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Format::Png,
        _ => {
            assert_eq!(checked, Err(ImageFault::Format));
            return;
        }
    };
    let reader = || {
        let mut reader = ::image::ImageReader::with_format(std::io::Cursor::new(input), format.decoder());
        let mut limits = ::image::Limits::default();
        limits.max_alloc = Some(1 << 24);
        reader.limits(limits);
        reader
    };
    let Ok(size) = reader().into_dimensions() else { return };
    // Decoders read on where a file makes no sense any more, and fail later; or panic, which is theirs to mend.
    if u64::from(size.0) * u64::from(size.1) > LARGEST || !matches!(quietly(|| reader().decode()), Ok(Ok(_)))
    {
        return;
    }
    match checked {
        Ok(header) => assert_eq!((header.format, header.width, header.height), (format, size.0, size.1)),
        Err(ImageFault::TooSmall(width, height) | ImageFault::TooLarge(width, height)) => {
            assert_eq!((width, height), size);
        }
        Err(fault) => panic!("{fault:?}, but {size:?}"),
    }
}

/// What comes of `work`, without the fuzzer's hook, which ends the process at once.
fn quietly<T>(work: impl FnOnce() -> T + UnwindSafe) -> std::thread::Result<T> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| ()));
    let done = panic::catch_unwind(work);
    panic::set_hook(hook);
    done
}

/// What can be read is written as what is read as the same.
fn envelope(input: &[u8]) {
    let message = Bytes::copy_from_slice(input);
    if let Ok((header, tail)) = JobHeader::decode(&message) {
        assert_eq!(JobHeader::decode(&header.encode(&tail)).expect("its own form"), (header, tail));
    }
    if let Ok((header, sealed)) = ResultHeader::decode(&message) {
        let report = sealed.as_ref().map_or(&[][..], |sealed| &sealed.bytes);
        let (again, sealed_again) = ResultHeader::decode(&header.encode(report)).expect("its own form");
        assert_eq!(again, header);
        assert_eq!(sealed_again.map(|sealed| sealed.bytes), sealed.map(|sealed| sealed.bytes));
    }
    if let Ok(payload) = Payload::decode(input.to_vec()) {
        assert_eq!(Payload::decode(payload.encode()).expect("its own form"), payload);
    }
}

/// Against splitting the whole text; the first byte says how long a line may be, the second how the text comes.
fn lines(input: &[u8]) {
    let [limit, chunk, text @ ..] = input else { return };
    let (limit, chunk) = (usize::from(*limit), usize::from(*chunk) + 1);
    let mut expected = Vec::new();
    let ended = text.strip_suffix(b"\n").unwrap_or(text);
    for (number, line) in ended.split(|byte| *byte == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if !line.is_empty() {
            let line = (line.len() <= limit).then(|| Bytes::copy_from_slice(line));
            expected.push((number + 1, line));
        }
    }
    let chunks = text.chunks(chunk).map(<[u8]>::to_vec).collect();
    // What is in hand: what is left of a line that may still be one, and a chunk.
    let kib = (limit + chunk + 2).div_ceil(1024) + 1;
    assert_eq!(ingress::split(chunks, limit, kib).expect("it fits"), expected);
}

fn prefer(input: &[u8]) {
    let fields: Vec<&[u8]> = input.split(|byte| *byte == b'\n').collect();
    let (respond_async, wait) = ingress::prefer(&fields);
    assert!(wait.is_none_or(|wait| wait <= MAX_WAIT));
    // What comes in a field of its own changes nothing that was said before.
    let with = |field: &'static [u8]| ingress::prefer(&[&fields[..], &[field]].concat());
    assert_eq!(with(b"x-unknown=\"a, respond-async\""), (respond_async, wait));
    assert_eq!(with(b"respond-async"), (true, wait));
    assert_eq!(with(b"wait=7"), (respond_async, wait.or(Some(Duration::from_secs(7)))));
    // Without quotation marks it is what stands between commas.
    if !input.contains(&b'"') {
        let text =
            |field: &&[u8]| str::from_utf8(field).ok().filter(|text| is_field(text)).map(str::to_owned);
        let said: Vec<String> = fields.iter().filter_map(text).collect();
        let tokens = said.iter().flat_map(|field| field.split(','));
        let name =
            |token: &str| token.split([';', '=']).next().unwrap_or_default().trim().to_ascii_lowercase();
        assert_eq!(tokens.map(name).any(|name| name == "respond-async"), respond_async);
    }
}

/// Whether a text may be a field's value and is looked at: visible ASCII, spaces and tabs.
fn is_field(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'\t' | b' '..=b'~'))
}

fn accept(input: &[u8]) {
    let fields: Vec<&[u8]> = input.split(|byte| *byte == b'\n').collect();
    let accepts = ingress::accepts(&fields);
    let with = |field: &'static [u8]| ingress::accepts(&[&fields[..], &[field]].concat());
    assert!(with(b"application/fhir+json"), "a range of its own counts");
    let is_sent = fields.iter().any(|field| str::from_utf8(field).is_ok_and(is_field));
    for refused in
        [&b"text/html"[..], b"application/fhir+json; fhirVersion=3.0", b"*/*;q=0", b"a/b;c=\"d, */*\""]
    {
        assert_eq!(with(refused), accepts && is_sent, "{}", String::from_utf8_lossy(refused));
    }
}

/// Whatever a caller writes there itself, it stands before what balancers append.
fn forwarded(input: &[u8]) {
    let balancer: IpAddr = "10.0.0.1".parse().expect("an address");
    let caller: IpAddr = "192.0.2.7".parse().expect("an address");
    let fields: Vec<&[u8]> = input.split(|byte| *byte == b'\n').collect();
    let _ = http::forwarded(&fields, balancer);
    let appended: [&[u8]; 4] = [
        b"for=192.0.2.7",
        b"for=\"192.0.2.7:4711\";proto=https",
        b"by=_a;for=\"[::ffff:192.0.2.7]\"",
        b", ,for=192.0.2.7, for=10.1.2.3,",
    ];
    for hop in appended {
        assert_eq!(http::forwarded(&[&fields[..], &[hop]].concat(), balancer), caller);
        let same: Vec<u8> = [input, b", ", hop].concat();
        if !input.contains(&b'\n') && same.iter().all(|byte| *byte >= b' ' && *byte != 0x7f) {
            assert_eq!(http::forwarded(&[&same], balancer), caller, "{}", String::from_utf8_lossy(&same));
        }
    }
    assert_eq!(http::forwarded(&[&fields[..], &[b"for=unknown"]].concat(), balancer), balancer);
}

/// The same however it comes, and nothing of what follows a header is taken for it.
fn proxy(input: &[u8]) {
    let read = |bytes: &[u8], chunk| {
        let mut read = Box::pin(http::proxy(bytes, chunk));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match read.as_mut().poll(&mut context) {
            std::task::Poll::Ready(read) => read.map_err(|error| error.kind()),
            std::task::Poll::Pending => panic!("what is in memory is there"),
        }
    };
    let whole = read(input, 4_096);
    for chunk in [1, 7, 512] {
        assert_eq!(read(input, chunk).is_ok(), whole.is_ok(), "{chunk}");
        if let (Ok(piecewise), Ok(whole)) = (read(input, chunk), &whole) {
            assert_eq!(&piecewise, whole, "{chunk}");
        }
    }
    let source: IpAddr = "192.0.2.7".parse().expect("an address");
    let v1 = b"PROXY TCP4 192.0.2.7 10.0.0.1 4660 443\r\n";
    let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\x0a\0\0\x01\x12\x34\x01\xbb";
    for head in [&v1[..], v2] {
        assert_eq!(read(&[head, input].concat(), 512), Ok((Some(source), input.to_vec())));
    }
}

/// Against `form_urlencoded`: a form with both fields, once each, is read as it reads it.
fn form(input: &[u8]) {
    let pairs: Vec<_> = url::form_urlencoded::parse(input).collect();
    let all = |name: &str| {
        pairs.iter().filter(|(key, _)| key == name).map(|(_, value)| value.to_string()).collect::<Vec<_>>()
    };
    let (names, passwords, scopes) = (all("username"), all("password"), all("scope"));
    match (ingress::form(input), &names[..], &passwords[..]) {
        (Some((name, password)), [known], [secret]) => assert_eq!((&name, &password), (known, secret)),
        (None, [_], [_]) => assert!(scopes.len() > 1, "refused"),
        (Some(_), ..) => panic!("a field is missing or there twice"),
        (None, ..) => {}
    }
}
