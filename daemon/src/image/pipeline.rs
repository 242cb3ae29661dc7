//! The stages of a layer's way that run at the same time: inflating, hashing and unpacking, each on its
//! own thread, with short queues between.
//!
//! ```text
//! source -> SHA-256 -> inflate --+--> SHA-256 (diff id)
//!                                +--> tar -> files        (the caller's thread)
//! ```
//! A chunk is inflated into a buffer once and both readers look at it there. Buffers are used again:
//! a layer has at most a dozen of them, whatever its size.

use std::{
    io::{self, BufRead, Read},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use sha2::{Digest as _, Sha256};

/// Size of a chunk, in bytes: large enough that most files are one write(2).
pub(super) const CHUNK: usize = 256 << 10;

/// Chunks that wait for a reader. Full: inflating waits.
const QUEUE: usize = 4;

/// What became of a stream.
pub(super) struct Passed<T> {
    /// What the reader made of it.
    pub result: T,
    /// SHA-256 of the inflated bytes, as far as they were read.
    pub hash: [u8; 32],
    /// There were more of them than allowed.
    pub too_large: bool,
}

/// Runs `plain` on a thread of its own, and `read` on what it yields, in the caller's thread. When
/// `read` is done, `plain` is ended. More than `limit` bytes are an error.
///
/// `make` is called on the inflating thread. `done` is called as soon as `read` has returned, for a
/// source that waits to be told.
pub(super) fn pass<S, M, T>(
    make: M,
    limit: u64,
    read: impl FnOnce(&mut Chunks) -> T,
    done: impl FnOnce(&T),
) -> Passed<T>
where
    S: Read,
    M: FnOnce() -> io::Result<S> + Send,
{
    thread::scope(|scope| {
        let (chunks, queue) = sync_channel(QUEUE);
        let (to_hash, hash_queue) = sync_channel::<Arc<Chunk>>(QUEUE);
        let inflating = scope.spawn(move || inflate(make, limit, &chunks, &to_hash));
        let hashing = scope.spawn(move || {
            let mut hash = Sha256::new();
            while let Ok(chunk) = hash_queue.recv() {
                hash.update(chunk.data());
            }
            hash.finalize().into()
        });
        let mut chunks = Chunks { queue, current: None, start: 0 };
        let result = read(&mut chunks);
        done(&result);
        // Inflating ends at the closed queue, and hashing with it.
        drop(chunks);
        let too_large = inflating.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let hash = hashing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Passed { result, hash, too_large }
    })
}

type Queued = io::Result<Arc<Chunk>>;

/// True: there was more than `limit`.
fn inflate<S: Read>(
    make: impl FnOnce() -> io::Result<S>,
    limit: u64,
    chunks: &SyncSender<Queued>,
    to_hash: &SyncSender<Arc<Chunk>>,
) -> bool {
    let mut source = match make() {
        Ok(source) => source,
        Err(error) => {
            // A closed queue means that nobody wants to know.
            let _ = chunks.send(Err(error));
            return false;
        }
    };
    let pool = Arc::new(Mutex::new(Vec::new()));
    let mut left = limit;
    loop {
        let mut chunk = Chunk::new(&pool);
        let filled = chunk.fill(&mut source);
        if chunk.length as u64 > left {
            let _ = chunks.send(Err(io::Error::other("the layer is too large")));
            return true;
        }
        left -= chunk.length as u64;
        let ended = chunk.length == 0;
        if !ended {
            let chunk = Arc::new(chunk);
            if to_hash.send(chunk.clone()).is_err() || chunks.send(Ok(chunk)).is_err() {
                return false;
            }
        }
        match filled {
            Ok(()) if ended => return false,
            Ok(()) => {}
            Err(error) => {
                let _ = chunks.send(Err(error));
                return false;
            }
        }
    }
}

type Pool = Arc<Mutex<Vec<Box<[u8]>>>>;

struct Chunk {
    bytes: Box<[u8]>,
    length: usize,
    pool: Pool,
}

impl Chunk {
    fn new(pool: &Pool) -> Self {
        let free = pool.lock().expect("no panic while it is held").pop();
        let bytes = free.unwrap_or_else(|| vec![0; CHUNK].into_boxed_slice());
        Self { bytes, length: 0, pool: pool.clone() }
    }

    fn data(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Decoders give little at a time: reads until it is full or the source ends. What came before an
    /// error is there.
    fn fill(&mut self, source: &mut impl Read) -> io::Result<()> {
        self.length = 0;
        while self.length < self.bytes.len() {
            match source.read(&mut self.bytes[self.length..]) {
                Ok(0) => break,
                Ok(length) => self.length += length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if let Ok(mut pool) = self.pool.lock() {
            pool.push(bytes);
        }
    }
}

/// The inflated stream, for the thread that unpacks.
pub(super) struct Chunks {
    queue: Receiver<Queued>,
    current: Option<Arc<Chunk>>,
    start: usize,
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.current.as_ref().is_none_or(|chunk| self.start == chunk.length) {
            // Let go first: inflating may need the buffer.
            self.current = None;
            self.start = 0;
            // A queue that is closed without an error is the end.
            if let Ok(next) = self.queue.recv() {
                self.current = Some(next?);
            }
        }
        Ok(self.current.as_ref().map_or(&[], |chunk| &chunk.data()[self.start..]))
    }

    fn consume(&mut self, length: usize) {
        self.start += length;
    }
}

impl Read for Chunks {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

/// [`Read::read`] of what has a buffer of its own.
pub(super) fn read_buffered(source: &mut impl BufRead, out: &mut [u8]) -> io::Result<usize> {
    let buffer = source.fill_buf()?;
    let length = buffer.len().min(out.len());
    out[..length].copy_from_slice(&buffer[..length]);
    source.consume(length);
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(bytes: &[u8]) -> [u8; 32] {
        Sha256::digest(bytes).into()
    }

    /// Gives seven bytes at a time, and then an error if there is one.
    struct Slow(Vec<u8>, Option<io::Error>);

    impl Read for Slow {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let length = self.0.len().min(7_000).min(out.len());
            if length == 0 {
                return self.1.take().map_or(Ok(0), Err);
            }
            out[..length].copy_from_slice(&self.0[..length]);
            self.0.drain(..length);
            Ok(length)
        }
    }

    #[test]
    fn all_bytes_pass_in_order_and_are_hashed() {
        for size in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 20 * CHUNK + 5] {
            let bytes: Vec<u8> = (0..size).map(|n| (n / 3) as u8).collect();
            let source = Slow(bytes.clone(), None);
            let passed = pass(
                || Ok(source),
                size as u64,
                |chunks| {
                    let mut read = Vec::new();
                    chunks.read_to_end(&mut read).map(|_| read)
                },
                |_| {},
            );
            assert!(passed.result.unwrap() == bytes && !passed.too_large);
            assert_eq!(passed.hash, hash(&bytes));
        }
    }

    #[test]
    fn an_error_comes_after_what_was_before_it() {
        let source = Slow(vec![1; CHUNK + 9], Some(io::Error::other("cut")));
        let passed = pass(
            || Ok(source),
            u64::MAX,
            |chunks| {
                let mut read = Vec::new();
                (chunks.read_to_end(&mut read).unwrap_err().to_string(), read.len())
            },
            |_| {},
        );
        assert_eq!(passed.result, ("cut".to_owned(), CHUNK + 9));
        let none = pass(
            || Err::<io::Empty, _>(io::Error::other("no source")),
            1,
            |chunks| chunks.fill_buf().map(<[u8]>::len).unwrap_err().to_string(),
            |_| {},
        );
        assert_eq!(none.result, "no source");
    }

    #[test]
    fn what_is_too_large_is_not_given() {
        let passed = pass(
            || Ok(io::repeat(1)),
            CHUNK as u64 * 3 / 2,
            |chunks| io::copy(chunks, &mut io::sink()).unwrap_err().to_string(),
            |_| {},
        );
        assert_eq!(passed.result, "the layer is too large");
        assert!(passed.too_large);
    }

    #[test]
    fn a_reader_that_stops_ends_all_of_it() {
        let passed = pass(
            || Ok(io::repeat(1)),
            u64::MAX,
            |chunks| chunks.fill_buf().unwrap()[0],
            |first| assert_eq!(*first, 1),
        );
        assert_eq!(passed.result, 1);
    }
}
