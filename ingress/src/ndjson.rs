//! Lines of a request body, one after the other, within bounds of memory and time.

use axum::body::{Body, BodyDataStream};
use bytes::{Bytes, BytesMut};
use dermflow_schemas::limits::{UPLOAD_ROOM_PATIENCE, UPLOAD_SILENCE};
use futures_util::StreamExt;
use tokio::time::timeout;

use crate::bodies::{Memory, Share, kib_of};

/// Splits a body at line feeds. Empty lines are passed over; a carriage return before the line feed is taken off.
pub(crate) struct Lines {
    body: BodyDataStream,
    /// Where its memory comes from.
    share: Share,
    /// The longest line.
    limit: usize,
    buffer: BytesMut,
    /// How much of the buffer holds no line feed.
    searched: usize,
    /// What accounts for the buffer.
    memory: Option<Memory>,
    /// Lines before the present one.
    count: usize,
    /// The present line is too long: the rest of it is thrown away.
    skipping: bool,
    ended: bool,
}

/// What came next.
#[derive(Debug)]
pub(crate) enum Next {
    /// A line and its number, from 1.
    Line { number: usize, bytes: Bytes, memory: Memory },
    /// The line of this number is longer than the limit.
    TooLong { number: usize },
    /// The body ended.
    End,
}

/// Why a body is not read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It was cut, or its sender took too long.
    Sender,
    /// There was no memory for it for too long.
    NoRoom,
}

impl Lines {
    pub(crate) fn new(body: Body, share: Share, limit: usize) -> Self {
        Self {
            body: body.into_data_stream(),
            share,
            limit,
            buffer: BytesMut::new(),
            searched: 0,
            memory: None,
            count: 0,
            skipping: false,
            ended: false,
        }
    }

    /// The next line. Cancel safe: what was received stays in the buffer.
    pub(crate) async fn next(&mut self) -> Result<Next, Cut> {
        loop {
            // First of all: whoever gave up the last time may have done so while it waited for memory.
            self.account().await?;
            if let Some(next) = self.take() {
                return Ok(next);
            }
            if self.ended {
                return Ok(Next::End);
            }
            let chunk = timeout(UPLOAD_SILENCE, self.body.next()).await.map_err(|_| Cut::Sender)?;
            match chunk.transpose().map_err(|_| Cut::Sender)? {
                None => self.ended = true,
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
            }
        }
    }

    /// What is in the buffer is accounted for, no less and no more, or waited for. A body is not read any further
    /// meanwhile.
    async fn account(&mut self) -> Result<(), Cut> {
        let needed = kib_of(self.buffer.len());
        let held = self.memory.as_ref().map_or(0, Memory::kib);
        if needed > held {
            let more = timeout(UPLOAD_ROOM_PATIENCE, self.share.wait(needed - held));
            let more = more.await.map_err(|_| Cut::NoRoom)?.map_err(|_| Cut::NoRoom)?;
            match &mut self.memory {
                Some(memory) => memory.merge(more),
                None => self.memory = Some(more),
            }
        } else if let Some(memory) = &mut self.memory {
            drop(memory.split(held - needed));
        }
        Ok(())
    }

    /// A whole line from the buffer, if there is one, with the part of the memory that stands for it.
    fn take(&mut self) -> Option<Next> {
        loop {
            let feed = memchr::memchr(b'\n', &self.buffer[self.searched..]);
            let end = match feed {
                Some(position) => self.searched + position,
                None if self.ended && !self.buffer.is_empty() => self.buffer.len(),
                None => {
                    self.searched = self.buffer.len();
                    return self.skip_long();
                }
            };
            let mut line = self.buffer.split_to(end);
            if feed.is_some() {
                let _ = self.buffer.split_to(1);
            }
            self.searched = 0;
            line.truncate(content(&line));
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            self.count += 1;
            if line.is_empty() {
                continue;
            }
            if line.len() > self.limit {
                return Some(Next::TooLong { number: self.count });
            }
            let memory = self.memory.as_mut().and_then(|memory| memory.split(kib_of(line.len())));
            let memory = memory.expect("the buffer, whose first line this is, has been accounted for");
            return Some(Next::Line { number: self.count, bytes: line.freeze(), memory });
        }
    }

    /// A line that is too long already is told of once, and thrown away as it comes.
    fn skip_long(&mut self) -> Option<Next> {
        if content(&self.buffer) <= self.limit && !self.skipping {
            return None;
        }
        self.buffer.clear();
        (self.searched, self.memory) = (0, None);
        if std::mem::replace(&mut self.skipping, true) {
            return None;
        }
        self.count += 1;
        Some(Next::TooLong { number: self.count })
    }

    /// What is left of the body.
    pub(crate) fn into_rest(self) -> BodyDataStream {
        self.body
    }
}

/// The length of a line without the carriage return that may end it.
fn content(line: &[u8]) -> usize {
    line.strip_suffix(b"\r").map_or(line.len(), <[u8]>::len)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;

    use super::*;
    use crate::bodies::Bodies;

    /// The lines of a body that arrives in chunks of `size` bytes.
    async fn lines(body: &str, size: usize) -> Vec<(usize, String)> {
        let chunks: Vec<_> = body.as_bytes().chunks(size).map(Bytes::copy_from_slice).collect();
        let body = Body::from_stream(stream::iter(chunks.into_iter().map(Ok::<_, Infallible>)));
        let memory = Bodies::new(64, 64);
        let mut lines = Lines::new(body, memory.share(None), 10);
        let mut found = Vec::new();
        loop {
            match lines.next().await.unwrap() {
                Next::Line { number, bytes, .. } => {
                    found.push((number, String::from_utf8(bytes.to_vec()).unwrap()));
                }
                Next::TooLong { number } => found.push((number, "too long".into())),
                Next::End => break,
            }
        }
        drop(lines);
        assert_eq!(memory.held(), 0, "memory is given back");
        found
    }

    #[tokio::test]
    async fn lines_are_the_same_however_they_arrive() {
        for size in 1..30 {
            let found = lines("one\r\n\ntwo\nmuch too long a line\nthree\n\nlast", size).await;
            let expected = [(1, "one"), (3, "two"), (4, "too long"), (5, "three"), (7, "last")];
            assert_eq!(found, expected.map(|(n, text)| (n, text.to_owned())), "in chunks of {size}");
            assert_eq!(lines("", size).await, []);
            assert_eq!(lines("0123456789ab\n", size).await, [(1, "too long".to_owned())]);
            assert_eq!(lines("0123456789ab", size).await, [(1, "too long".to_owned())]);
            assert_eq!(lines("0123456789\n1", size).await.len(), 2);
            assert_eq!(lines("0123456789\r\n", size).await, [(1, "0123456789".to_owned())]);
        }
    }
}
