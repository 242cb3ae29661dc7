//! SPDY/3 header blocks: zlib with a preset dictionary, one stream for the whole connection.
//!
//! Ours carry no headers (no client looks for any in a reply), so they are written as stored blocks: a
//! valid zlib stream that needs no compressor, which would be 256 KiB for each session (zlib's formula).

use std::sync::LazyLock;

use bytes::{Buf, BufMut, BytesMut};
use flate2::{Decompress, FlushDecompress};

/// The most that a block may inflate to.
pub(crate) const MAX_HEADERS: usize = 64 * 1024;
/// The empty stored block at the end of what a deflate encoder flushes.
const SYNC: [u8; 5] = [0, 0, 0, 0xff, 0xff];
/// Adler-32 of the dictionary, by which a zlib stream asks for it.
pub(crate) const DICTIONARY_ID: u32 = 0xe3c6_a7c2;

const WORDS: [&str; 65] = [
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized\
403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,\
text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// The dictionary of SPDY/3: header names with their lengths, then frequent values.
static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::new();
    for word in WORDS {
        dictionary.put_u32(word.len() as u32);
        dictionary.put_slice(word.as_bytes());
    }
    dictionary.put_slice(TAIL.as_bytes());
    dictionary
});

/// A stream's headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of a header; names are compared without regard to case.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// Why a header block ends the session: the decompressor is out of step after it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("header block that is not zlib with SPDY's dictionary")]
    Zlib,
    #[error("header block of more than {MAX_HEADERS} bytes")]
    TooLarge,
    #[error("header block that ends early or holds too much")]
    Malformed,
    #[error("header that is not UTF-8")]
    Text,
}

/// Takes a connection's header blocks, in order.
pub(crate) struct Inflater {
    zlib: Decompress,
    block: Vec<u8>,
}

impl Inflater {
    pub(crate) fn new() -> Self {
        Self { zlib: Decompress::new(true), block: Vec::new() }
    }

    /// The headers of one block.
    pub(crate) fn headers(&mut self, compressed: &[u8]) -> Result<Headers, HeaderError> {
        self.inflate(compressed)?;
        let headers = parse(&self.block);
        if self.block.capacity() > 4096 {
            self.block = Vec::new();
        }
        headers
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<(), HeaderError> {
        self.block.clear();
        let mut piece = [0; 2048];
        loop {
            let (read, written) = (self.zlib.total_in(), self.zlib.total_out());
            let result = self.zlib.decompress(input, &mut piece, FlushDecompress::Sync);
            input = &input[(self.zlib.total_in() - read) as usize..];
            let written = (self.zlib.total_out() - written) as usize;
            match result {
                Ok(_) => {}
                Err(error) if error.needs_dictionary() == Some(DICTIONARY_ID) => {
                    self.zlib.set_dictionary(&DICTIONARY).map_err(|_| HeaderError::Zlib)?;
                    continue;
                }
                Err(_) => return Err(HeaderError::Zlib),
            }
            if self.block.len() + written > MAX_HEADERS {
                return Err(HeaderError::TooLarge);
            }
            self.block.extend_from_slice(&piece[..written]);
            // A piece that is not full means that zlib has no more to give for this input.
            if written < piece.len() {
                // What it does not take after its own end belongs to nothing.
                return if input.is_empty() { Ok(()) } else { Err(HeaderError::Zlib) };
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, HeaderError> {
    let count = block.try_get_u32().map_err(|_| HeaderError::Malformed)? as usize;
    // Each pair needs its two lengths.
    if count > block.len() / 8 {
        return Err(HeaderError::Malformed);
    }
    let mut headers = Vec::with_capacity(count.min(16));
    for _ in 0..count {
        headers.push((text(&mut block)?, text(&mut block)?));
    }
    if block.is_empty() { Ok(Headers(headers)) } else { Err(HeaderError::Malformed) }
}

fn text(block: &mut &[u8]) -> Result<String, HeaderError> {
    let length = block.try_get_u32().map_err(|_| HeaderError::Malformed)? as usize;
    let (text, rest) = block.split_at_checked(length).ok_or(HeaderError::Malformed)?;
    *block = rest;
    Ok(std::str::from_utf8(text).map_err(|_| HeaderError::Text)?.to_owned())
}

/// Makes the blocks of our replies: no headers at all.
#[derive(Default)]
pub(crate) struct EmptyBlocks {
    begun: bool,
}

impl EmptyBlocks {
    pub(crate) fn next(&mut self) -> BytesMut {
        let mut block = BytesMut::with_capacity(20);
        if !self.begun {
            self.begun = true;
            // zlib: deflate, 32 KiB window, preset dictionary; the two bytes are a multiple of 31.
            block.put_slice(&[0x78, 0x20]);
            block.put_u32(DICTIONARY_ID);
        }
        // Deflate: a stored block, not the last, of four bytes (a count of 0) …
        block.put_slice(&[0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0]);
        // … and an empty one, as a sync flush ends with. Go's inflate gives out what it has only there;
        // without it Kubernetes' clients miss the reply, and the second block finds it in an error.
        block.put_slice(&SYNC);
        block
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress, Status};
    use proptest::prelude::*;

    use super::*;

    struct Deflater(Compress);

    impl Deflater {
        fn new() -> Self {
            let mut zlib = Compress::new(Compression::default(), true);
            assert_eq!(zlib.set_dictionary(&DICTIONARY).unwrap(), DICTIONARY_ID);
            Self(zlib)
        }

        fn raw(&mut self, block: &[u8]) -> Vec<u8> {
            let mut out = Vec::with_capacity(block.len() + 1024);
            assert_eq!(
                self.0.compress_vec(block, &mut out, FlushCompress::Sync).unwrap(),
                Status::Ok
            );
            out
        }

        fn block(&mut self, headers: &[(String, String)]) -> Vec<u8> {
            let mut block = Vec::new();
            block.put_u32(headers.len() as u32);
            for text in headers.iter().flat_map(|(name, value)| [name, value]) {
                block.put_u32(text.len() as u32);
                block.put_slice(text.as_bytes());
            }
            self.raw(&block)
        }
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn the_dictionary_is_that_of_the_specification() {
        assert_eq!(DICTIONARY.len(), 1423);
        // Adler-32, computed here from its definition.
        let (a, b) = DICTIONARY.iter().fold((1u32, 0u32), |(a, b), byte| {
            let a = (a + u32::from(*byte)) % 65521;
            (a, (b + a) % 65521)
        });
        assert_eq!(b << 16 | a, DICTIONARY_ID);
    }

    #[test]
    fn blocks_of_one_connection_share_their_history() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
        for id in 0..200 {
            let sent =
                pairs(&[("streamtype", "data"), ("port", "8080"), ("requestid", &id.to_string())]);
            let block = deflater.block(&sent);
            assert_eq!(inflater.headers(&block), Ok(Headers(sent)));
        }
    }

    #[test]
    fn a_block_that_inflates_too_far_is_cut_off() {
        let bomb = Deflater::new().raw(&vec![0; 10 << 20]);
        assert!(bomb.len() < 64 * 1024, "{}", bomb.len());
        let mut inflater = Inflater::new();
        assert_eq!(inflater.headers(&bomb), Err(HeaderError::TooLarge));
        assert!(inflater.block.capacity() <= 2 * MAX_HEADERS);
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for block in [
            &[0xff, 0xff, 0xff, 0xff][..],
            &[0, 0, 0, 1, 0, 0, 0, 9, b'x', 0, 0, 0, 0],
            &[0, 0, 0, 0, 7],
            &[0, 0],
            &[],
        ] {
            let block = Deflater::new().raw(block);
            assert_eq!(Inflater::new().headers(&block), Err(HeaderError::Malformed));
        }
        assert_eq!(Inflater::new().headers(b"GET / HTTP/1.1"), Err(HeaderError::Zlib));
        let no_text = Deflater::new().raw(&[0, 0, 0, 1, 0, 0, 0, 1, 0xff, 0, 0, 0, 0]);
        assert_eq!(Inflater::new().headers(&no_text), Err(HeaderError::Text));
    }

    #[test]
    fn bytes_after_the_end_of_the_zlib_stream_are_refused() {
        let mut zlib = Deflater::new().0;
        let mut out = Vec::with_capacity(1024);
        zlib.compress_vec(&[0, 0, 0, 0], &mut out, FlushCompress::Finish).unwrap();
        let mut inflater = Inflater::new();
        assert_eq!(inflater.headers(&out), Ok(Headers::default()));
        assert!(inflater.headers(b"more").is_err());
    }

    #[test]
    fn our_blocks_are_zlib() {
        let (mut blocks, mut inflater) = (EmptyBlocks::default(), Inflater::new());
        for _ in 0..3 {
            let block = blocks.next();
            assert_eq!(inflater.headers(&block), Ok(Headers::default()));
            assert!(block.ends_with(&SYNC), "Go's inflate needs it");
        }
    }

    #[test]
    fn names_have_no_case() {
        let headers = Headers(pairs(&[("Streamtype", "stdin")]));
        assert_eq!(headers.get("streamType"), Some("stdin"));
        assert_eq!(headers.get("port"), None);
    }

    proptest! {
        #[test]
        fn headers_come_back_as_they_were(
            blocks in proptest::collection::vec(
                proptest::collection::vec((".{0,40}", ".{0,400}"), 0..8), 1..8),
        ) {
            let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
            for headers in blocks {
                let block = deflater.block(&headers);
                prop_assert_eq!(inflater.headers(&block), Ok(Headers(headers)));
            }
        }

        #[test]
        fn any_bytes_end_in_headers_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            raw in any::<bool>(),
        ) {
            let block = if raw { bytes } else { Deflater::new().raw(&bytes) };
            let _ = Inflater::new().headers(&block);
        }
    }
}
