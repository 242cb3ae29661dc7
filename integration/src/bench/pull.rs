//! Pulls: whole images in turns with the other runtime, and what a pull costs besides time.
//!
//! The images are made here, from seeded noise that compresses like programs do, so that every run and
//! every machine pulls the same bytes. Before each turn the disk is quiet: what the turn before wrote or
//! removed is not on this one's bill.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{
    Plan, Side, cpu, millis, progress,
    samples::{
        FLOOR, HOLDFAST, PULL_40, PULL_40_ZSTD, PULL_FETCHED, PULL_MEMORY, PULL_ONE, PULL_ONE_ZSTD,
        PULL_SHARED, PULL_TEN, PULL_TEN_AT_ONCE, PULL_TEN_CPU, PULL_TEN_ZSTD, PULL_TEN_ZSTD_CPU,
        PULL_UP_TO_DATE, PULL_WRITTEN, Samples,
    },
};
use crate::{
    Image, Registry,
    image::{Blob, Builder, Compression},
    tar::Entry,
    wait::{Look, eventually},
};

const MIB: usize = 1 << 20;

/// How long the disk may take to become quiet.
const QUIET: Duration = Duration::from_secs(40);

/// What there is to pull.
pub const PULLED: [&str; 8] =
    ["ten", "one", "forty", "ten-zstd", "one-zstd", "forty-zstd", "many", "shared"];

/// An image in the registry.
struct Pushed {
    reference: String,
    layers: Vec<Layer>,
    /// Bytes of its layers' archives.
    unpacked: usize,
}

struct Layer {
    /// Where the registry has it.
    path: String,
    /// Bytes, as they are sent.
    size: u64,
}

impl Pushed {
    fn last(&self) -> &Layer {
        self.layers.last().expect("each has layers")
    }
}

/// All of it.
pub(super) async fn run(
    plan: &Plan,
    samples: &mut Samples,
    sides: &mut [Side],
    registry: &Registry,
) -> Result<()> {
    let rounds = if plan.quick { 3 } else { 9 };
    let wants = |name: &str| plan.images.is_empty() || plan.images.iter().any(|n| n == name);
    type Make = fn(u64) -> Vec<Vec<Entry>>;
    let ten: Make = |seed| (0..10).map(|layer| mixed(seed + layer, 1024 * MIB / 10)).collect();
    let one: Make = |seed| vec![mixed(seed, 500 * MIB)];
    let forty: Make = |seed| (0..40).map(|layer| small(seed + layer)).collect();
    let images: [(&str, Make, Compression, &'static str); 6] = [
        ("ten", ten, Compression::Gzip, PULL_TEN),
        ("one", one, Compression::Gzip, PULL_ONE),
        ("forty", forty, Compression::Gzip, PULL_40),
        ("ten-zstd", ten, Compression::Zstd, PULL_TEN_ZSTD),
        ("one-zstd", one, Compression::Zstd, PULL_ONE_ZSTD),
        ("forty-zstd", forty, Compression::Zstd, PULL_40_ZSTD),
    ];
    for (name, make, compression, metric) in images {
        if !wants(name) {
            continue;
        }
        let image = push(registry, name, make(1), compression).await?;
        for round in 0..rounds {
            progress(format!("{metric}: {}/{rounds}", round + 1));
            quiet().await?;
            let started = Instant::now();
            download(registry, &image).await?;
            samples.add(metric, FLOOR, millis(started));
            // Who is first takes turns too.
            for at in 0..sides.len() {
                let side = &mut sides[(at + round) % sides.len()];
                measured(side, registry, &image, metric, samples).await?;
            }
        }
    }
    if wants("many") {
        progress("pulls of one image, by many");
        let layers = vec![mixed(100, 100 * MIB)];
        let image = push(registry, "many", layers, Compression::Gzip).await?;
        for _ in 0..rounds {
            for side in sides.iter_mut() {
                many(side, registry, &image, samples).await?;
            }
        }
    }
    if wants("shared") {
        progress("images that share layers, and one that is here");
        let layers = |last: u64| (0..9).chain([last]).map(|n| mixed(200 + n, 4 * MIB)).collect();
        let first = push(registry, "shared", layers(9), Compression::Gzip).await?;
        let second = push(registry, "shared", layers(10), Compression::Gzip).await?;
        for _ in 0..rounds {
            for side in sides.iter_mut() {
                shared(side, registry, &first, &second, samples).await?;
            }
        }
    }
    // What was removed last is on its way still, and whoever looks for what is left waits less long.
    quiet().await
}

/// What no pull can be faster than: all layers to nowhere, at once, of a registry that has them in
/// memory.
async fn download(registry: &Registry, image: &Pushed) -> Result<()> {
    try_join_all(image.layers.iter().map(|Layer { path, .. }| async move {
        let mut stream = TcpStream::connect(registry.host()).await?;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            registry.host()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut buffer = vec![0; 256 << 10];
        let mut length = stream.read(&mut buffer).await?;
        ensure!(buffer[..length].starts_with(b"HTTP/1.1 200 "), "{path} cannot be downloaded");
        while length > 0 {
            length = stream.read(&mut buffer).await?;
        }
        Ok(())
    }))
    .await?;
    Ok(())
}

/// A pull from nothing, and its removal.
async fn measured(
    side: &mut Side,
    registry: &Registry,
    image: &Pushed,
    metric: &'static str,
    samples: &mut Samples,
) -> Result<()> {
    quiet().await?;
    let before = registry.sent(&image.last().path).await?;
    let pid = side.daemon.pid();
    let memory = Peak::start(pid)?;
    let written = written(pid)?;
    let worked = cpu(pid)?;
    let started = Instant::now();
    side.pull(&image.reference).await?;
    samples.add(metric, side.column, millis(started));
    let its_cpu = match metric {
        PULL_TEN => Some(PULL_TEN_CPU),
        PULL_TEN_ZSTD => Some(PULL_TEN_ZSTD_CPU),
        _ => None,
    };
    if let Some(metric) = its_cpu {
        samples.add(metric, side.column, (cpu(pid)? - worked).as_secs_f64() * 1000.0);
    }
    samples.add(PULL_MEMORY, side.column, memory.mib()?);
    let written = (self::written(pid)? - written) as f64;
    samples.add(PULL_WRITTEN, side.column, written / image.unpacked as f64);
    fetched(side, registry, image, before).await?;
    side.remove_image(&image.reference).await
}

/// How many times the last layer was downloaded since `before` bytes of it. Less than once is no pull
/// that was measured.
async fn fetched(side: &Side, registry: &Registry, image: &Pushed, before: u64) -> Result<f64> {
    eventually(Duration::from_secs(5), "the registry to log the download", async || {
        let bytes = registry.sent(&image.last().path).await? - before;
        let size = image.last().size;
        let times = bytes as f64 / size as f64;
        Ok(if bytes >= size { Look::Done(times) } else { Look::Not(format!("{bytes} bytes")) })
    })
    .await
    .with_context(|| format!("{} had the layers already", side.column))
}

/// Ten calls for one image that is missing, compared with one such call just before.
async fn many(
    side: &mut Side,
    registry: &Registry,
    image: &Pushed,
    samples: &mut Samples,
) -> Result<()> {
    quiet().await?;
    let started = Instant::now();
    side.pull(&image.reference).await?;
    let one = millis(started);
    side.remove_image(&image.reference).await?;
    quiet().await?;
    let before = registry.sent(&image.last().path).await?;
    let started = Instant::now();
    let calls = (0..10).map(|_| {
        let mut images = side.images.clone();
        let request = super::pull_request(&image.reference);
        async move { images.pull_image(request).await }
    });
    try_join_all(calls).await?;
    samples.add(PULL_TEN_AT_ONCE, side.column, millis(started) / one);
    let fetched = fetched(side, registry, image, before).await?;
    samples.add(PULL_FETCHED, side.column, fetched);
    side.remove_image(&image.reference).await
}

/// An image that shares nine of ten layers with one that is here; and again, when it is here itself.
async fn shared(
    side: &mut Side,
    registry: &Registry,
    first: &Pushed,
    second: &Pushed,
    samples: &mut Samples,
) -> Result<()> {
    quiet().await?;
    side.pull(&first.reference).await?;
    let before = registry.asked("bench/shared").await?.len();
    side.pull(&second.reference).await?;
    let asked = registry.asked("bench/shared").await?.split_off(before);
    let layers = asked.iter().filter(|line| line.starts_with("GET ") && line.contains("/blobs/"));
    // One of them is the config.
    let layers = layers.count() - 1;
    samples.add(PULL_SHARED, side.column, layers as f64);

    let before = registry.asked("bench/shared").await?.len();
    let started = Instant::now();
    side.pull(&second.reference).await?;
    samples.add(PULL_UP_TO_DATE, side.column, millis(started));
    let asked = registry.asked("bench/shared").await?.split_off(before);
    if side.column == HOLDFAST {
        ensure!(
            asked.len() == 1 && asked[0].starts_with("HEAD "),
            "a pull of what is here asks for {asked:?}"
        );
    }
    side.remove_image(&second.reference).await?;
    side.remove_image(&first.reference).await
}

async fn push(
    registry: &Registry,
    name: &str,
    layers: Vec<Vec<Entry>>,
    compression: Compression,
) -> Result<Pushed> {
    progress(format!("makes image {name}"));
    let mut builder: Builder = Image::empty().cmd(["/none"]).compression(compression);
    let mut unpacked = 0;
    for entries in layers {
        let archive = crate::tar::archive(&entries);
        unpacked += archive.len();
        builder = builder.raw_layer(archive);
    }
    let image = tokio::task::spawn_blocking(move || builder.build()).await??;
    let sent: usize = image.layers.iter().map(|layer| layer.content.len()).sum();
    progress(format!("{name}: {} MiB, {} MiB unpacked", sent / MIB, unpacked / MIB));
    let tag = &image.manifest.digest["sha256:".len()..][..8];
    let repository = format!("bench/{name}");
    let reference = registry.push(&format!("{repository}:{tag}"), &image).await?;
    let layer = |blob: &Blob| Layer {
        path: format!("/v2/{repository}/blobs/{}", blob.digest),
        size: blob.content.len() as u64,
    };
    let layers = image.layers.iter().map(layer).collect();
    Ok(Pushed { reference, layers, unpacked })
}

/// About `size` bytes: two thirds of them in files of megabytes, the rest in many small ones, as a
/// layer with a language's runtime and its packages has them.
fn mixed(seed: u64, size: usize) -> Vec<Entry> {
    let mut noise = Noise::new(seed);
    let top = format!("usr/lib/part{seed}");
    let mut entries =
        vec![Entry::dir("usr", 0o755), Entry::dir("usr/lib", 0o755), Entry::dir(&top, 0o755)];
    let large = (size / 8).clamp(MIB, 16 * MIB);
    let mut left = size;
    let mut number = 0;
    while left > size / 3 {
        let length = large.min(left);
        let path = format!("{top}/lib{number}.so");
        entries.push(Entry::file(&path, 0o755, noise.bytes(length)));
        left -= length;
        number += 1;
    }
    let mut listed = None;
    while left > 0 {
        let package = format!("{top}/package{}", number / 64);
        if listed.as_deref() != Some(&*package) {
            entries.push(Entry::dir(&package, 0o755));
            listed = Some(package.clone());
        }
        // 512 bytes to 64 KiB; half of them below 6 KiB.
        let length = (512 << (noise.next() % 8)) as usize;
        let length = (length + noise.next() as usize % length).min(left);
        let path = format!("{package}/module{number}.py");
        entries.push(Entry::file(&path, 0o644, noise.bytes(length)));
        left -= length;
        number += 1;
    }
    entries
}

/// A layer as a build step makes it: some twenty files, half a MiB.
fn small(seed: u64) -> Vec<Entry> {
    let mut noise = Noise::new(seed);
    let top = format!("step{seed}");
    let mut entries = vec![Entry::dir(&top, 0o755)];
    for number in 0..20 {
        let length = 1024 + noise.next() as usize % (48 << 10);
        entries.push(Entry::file(&format!("{top}/{number}"), 0o644, noise.bytes(length)));
    }
    entries
}

/// Seeded bytes that gzip makes about 2.5 times smaller: words of a fixed list, with noise between.
struct Noise {
    state: u64,
    words: Vec<u8>,
}

impl Noise {
    const WORDS: usize = 8 << 10;

    fn new(seed: u64) -> Self {
        let mut noise = Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, words: vec![] };
        // The list is the same for all: only its order of use is the seed's.
        let mut list = Self { state: 7, words: vec![] };
        noise.words = (0..Self::WORDS / 8).flat_map(|_| list.next().to_le_bytes()).collect();
        noise
    }

    /// xorshift64*.
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 64);
        while bytes.len() < length {
            let random = self.next();
            if random % 100 < 40 {
                bytes.extend_from_slice(&(random >> 8).to_le_bytes());
            } else {
                // Near the start of the list more often, as words are.
                let word = (random >> 16) as usize % (1 << (4 + (random >> 8) % 7));
                let at = word * 8 % (Self::WORDS - 32);
                let length = 8 + (random >> 40) as usize % 24;
                bytes.extend_from_slice(&self.words[at..at + length]);
            }
        }
        bytes.truncate(length);
        bytes
    }
}

/// Writes back all that is dirty, and waits until removals that go on behind it have ended.
async fn quiet() -> Result<()> {
    let free = || -> Result<(u64, u64)> {
        let stat = nix::sys::statvfs::statvfs("/var/tmp")?;
        Ok((stat.blocks_free() * stat.fragment_size(), stat.files_free()))
    };
    let until = Instant::now() + QUIET;
    loop {
        tokio::task::spawn_blocking(nix::unistd::sync).await?;
        let (bytes, files) = free()?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (bytes_now, files_now) = free()?;
        // Of small files few bytes come free, but each is one.
        let is_quiet = bytes.abs_diff(bytes_now) < MIB as u64 && files.abs_diff(files_now) < 20;
        // Others may use the disk as well: after a while it is as it is.
        if is_quiet || Instant::now() > until {
            return Ok(());
        }
    }
}

/// Bytes that a process has sent to disks, or made dirty so that they will be (proc_pid_io(5)).
fn written(pid: i32) -> Result<u64> {
    field(&format!("/proc/{pid}/io"), "write_bytes:")
}

/// The peak of a process' resident memory since.
struct Peak {
    pid: i32,
    before: u64,
}

impl Peak {
    fn start(pid: i32) -> Result<Self> {
        // 5: the peak is forgotten (proc_pid_clear_refs(5)).
        fs::write(format!("/proc/{pid}/clear_refs"), "5").context("reset the peak of memory")?;
        Ok(Self { pid, before: field(&format!("/proc/{pid}/status"), "VmRSS:")? })
    }

    fn mib(&self) -> Result<f64> {
        let peak = field(&format!("/proc/{}/status", self.pid), "VmHWM:")?;
        Ok(peak.saturating_sub(self.before) as f64 / 1024.0)
    }
}

/// A number in a file of lines.
fn field(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let value = value.and_then(|value| value.split_whitespace().next());
    Ok(value.with_context(|| format!("no {name} in {path}"))?.parse()?)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn layers_are_the_same_each_time_and_compress_like_programs() {
        let archive = crate::tar::archive(&mixed(3, 4 * MIB));
        assert!(archive == crate::tar::archive(&mixed(3, 4 * MIB)));
        assert!(archive != crate::tar::archive(&mixed(4, 4 * MIB)));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&archive).unwrap();
        let ratio = archive.len() as f64 / gzip.finish().unwrap().len() as f64;
        assert!((1.8..3.5).contains(&ratio), "{ratio}");
    }
}
