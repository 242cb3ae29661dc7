//! Keys that leave a session and let its container run on.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::oneshot;

/// A sequence of keys, as the terminal sends them. An empty one is never typed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Keys(Vec<u8>);

/// "ctrl-p,ctrl-q"; "" for none.
pub(super) fn parse_keys(text: &str) -> Result<Keys, String> {
    if text.is_empty() {
        return Ok(Keys::default());
    }
    let key = |name: &str| {
        let rule = || {
            format!(
                "{name:?} is no key; a key is one character, or ctrl- and a letter or one of @[\\]^_, \
                 as in ctrl-p,ctrl-q"
            )
        };
        match name.strip_prefix("ctrl-").unwrap_or_default().as_bytes() {
            [letter @ (b'a'..=b'z' | b'A'..=b'Z' | b'@' | b'['..=b'_')] => Ok(letter & 0x1f),
            _ => match name.as_bytes() {
                [byte @ b' '..=b'~'] => Ok(*byte),
                _ => Err(rule()),
            },
        }
    };
    text.split(',').map(key).collect::<Result<_, _>>().map(Keys)
}

/// Looks for the keys in what is typed.
#[derive(Debug)]
struct Detector {
    keys: Keys,
    /// Typed, and as far as can be told the beginning of the keys.
    held: VecDeque<u8>,
}

impl Detector {
    fn new(keys: Keys) -> Self {
        Self { keys, held: VecDeque::new() }
    }

    /// Takes a byte; what is certain not to be of the keys goes to `out`. `true`: the keys are complete.
    fn push(&mut self, byte: u8, out: &mut VecDeque<u8>) -> bool {
        self.held.push_back(byte);
        while !self.keys.0.iter().zip(&self.held).all(|(key, held)| key == held)
            || self.held.len() > self.keys.0.len()
        {
            out.extend(self.held.pop_front());
        }
        !self.held.is_empty() && self.held.len() == self.keys.0.len()
    }
}

/// Input without the keys. Once they are typed it tells so, and gives nothing more: an end would be the
/// end of the container's standard input.
pub(super) struct Watched<R> {
    inner: R,
    detector: Detector,
    out: VecDeque<u8>,
    ended: bool,
    detach: Option<oneshot::Sender<()>>,
}

impl<R> Watched<R> {
    /// Watches `inner`; the receiver resolves when the keys have been typed.
    pub(super) fn new(inner: R, keys: Keys) -> (Self, oneshot::Receiver<()>) {
        let (detach, detached) = oneshot::channel();
        let detector = Detector::new(keys);
        let out = VecDeque::new();
        (Self { inner, detector, out, ended: false, detach: Some(detach) }, detached)
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Watched<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            // What was typed before the keys is the container's.
            if !this.out.is_empty() {
                let (front, _) = this.out.as_slices();
                let count = front.len().min(buffer.remaining());
                buffer.put_slice(&front[..count]);
                this.out.drain(..count);
                return Poll::Ready(Ok(()));
            }
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            if this.detach.is_none() {
                return Poll::Pending;
            }
            let mut piece = [0; 4096];
            let mut read = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                this.ended = true;
                this.out.append(&mut this.detector.held);
                continue;
            }
            for byte in read.filled() {
                if this.detector.push(*byte, &mut this.out) {
                    // Nobody waits any more: the session is over already.
                    let _ = this.detach.take().map(|detach| detach.send(()));
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[test]
    fn keys_are_characters_and_control_characters() {
        assert_eq!(parse_keys("ctrl-p,ctrl-q"), Ok(Keys(vec![0x10, 0x11])));
        assert_eq!(parse_keys("ctrl-A"), Ok(Keys(vec![1])));
        assert_eq!(
            parse_keys("ctrl-@,ctrl-[,ctrl-\\,ctrl-],ctrl-^,ctrl-_").unwrap().0,
            [0, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f]
        );
        assert_eq!(parse_keys("a,~"), Ok(Keys(b"a~".to_vec())));
        assert_eq!(parse_keys(""), Ok(Keys(Vec::new())));
        for bad in [",", "ctrl-", "ctrl-1", "ctrl-pp", "ab", "é", "ctrl-p,", "alt-p", "\n"] {
            assert!(parse_keys(bad).unwrap_err().contains("ctrl-p,ctrl-q"), "{bad:?}");
        }
    }

    /// Gives its pieces one by one.
    struct Pieces(VecDeque<Vec<u8>>);
    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if let Some(piece) = self.0.pop_front() {
                buffer.put_slice(&piece);
            }
            Poll::Ready(Ok(()))
        }
    }

    proptest! {
        // Few different bytes, so that sequences overlap with themselves.
        #[test]
        fn all_before_the_keys_passes_and_nothing_behind_them(
            keys in prop::collection::vec(0u8..3, 0..5),
            pieces in prop::collection::vec(prop::collection::vec(0u8..3, 1..6), 0..20),
        ) {
            let typed = pieces.concat();
            let found = typed.windows(keys.len().max(1)).position(|w| w == keys);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (passed, detached) = runtime.block_on(async {
                let (mut input, mut detached) =
                    Watched::new(Pieces(pieces.into()), Keys(keys));
                let mut passed = Vec::new();
                let ended = tokio::select! {
                    biased;
                    read = input.read_to_end(&mut passed) => { read.unwrap(); true }
                    _ = &mut detached => false,
                };
                (passed, !ended)
            });
            prop_assert_eq!(detached, found.is_some());
            prop_assert_eq!(passed, &typed[..found.unwrap_or(typed.len())]);
        }
    }
}
