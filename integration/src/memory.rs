//! What memory a process has, by what it is: proc_pid_smaps(5).

use std::{collections::BTreeMap, fmt, fs};

use anyhow::{Context as _, Result};

/// A process' memory, in KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    parts: BTreeMap<Part, Use>,
}

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The program's pages that are as they are in the file: others that run it share them.
    Program,
    /// Those that it has changed, and its zeroed variables.
    Data,
    /// The heap that grows at its end (`brk`).
    Heap,
    /// Anonymous mappings.
    Mapped,
    /// The stack of the first thread.
    Stack,
    /// What the kernel maps into every process.
    Kernel,
}

/// What a part takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Proportional set size: what is shared counts for as much as there are that share it.
    pub pss: u64,
    /// What was written to, and nobody else has.
    pub dirty: u64,
}

impl Memory {
    /// That of a process, now.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut memory = Self::default();
        let mut part = Part::Mapped;
        let mut program_seen = false;
        for line in text.lines() {
            let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
            if !first.ends_with(':') {
                // "00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/dbus-daemon"
                let writable = rest.as_bytes().get(1) == Some(&b'w');
                let name = rest.split_whitespace().nth(4).unwrap_or_default();
                part = match name {
                    "[heap]" => Part::Heap,
                    "[stack]" => Part::Stack,
                    _ if name.starts_with("[v") => Part::Kernel,
                    _ if name.starts_with('/') && writable => Part::Data,
                    _ if name.starts_with('/') => Part::Program,
                    // Zeroed variables follow the program's others, before the heap.
                    _ if part == Part::Data && program_seen => Part::Data,
                    _ => Part::Mapped,
                };
                program_seen |= part == Part::Data;
                continue;
            }
            let value = || rest.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            let used = memory.parts.entry(part).or_default();
            match first {
                "Pss:" => used.pss += value(),
                "Private_Dirty:" => used.dirty += value(),
                // What was swapped out is still its own.
                "Swap:" => used.dirty += value(),
                _ => {}
            }
        }
        memory
    }

    /// That of one part.
    pub fn part(&self, part: Part) -> Use {
        self.parts.get(&part).copied().unwrap_or_default()
    }

    /// All of it, as the kernel shares it out.
    pub fn pss(&self) -> u64 {
        self.parts.values().map(|part| part.pss).sum()
    }

    /// What it has written to and has alone: it would be free if the process went.
    pub fn dirty(&self) -> u64 {
        self.parts.values().map(|part| part.dirty).sum()
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB, {} of its own", self.pss(), self.dirty())?;
        let parts = self.parts.iter().filter(|(_, used)| used.pss > 0);
        for (place, (part, used)) in parts.enumerate() {
            let before = if place == 0 { ": " } else { ", " };
            write!(f, "{before}{part:?} {}", used.pss)?;
            if used.dirty != used.pss {
                write!(f, " ({})", used.dirty)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart() {
        let text = "\
00400000-0065a000 r-xp 00000000 fe:00 1234    /usr/bin/shim
Pss:                 100 kB
Private_Dirty:         0 kB
0065a000-00662000 rw-p 0025a000 fe:00 1234    /usr/bin/shim
Pss:                  20 kB
Private_Dirty:        16 kB
00662000-00665000 rw-p 00000000 00:00 0
Pss:                   8 kB
Private_Dirty:         8 kB
01fa1000-01fd0000 rw-p 00000000 00:00 0       [heap]
Pss:                  64 kB
Private_Dirty:        64 kB
Swap:                  4 kB
7f0000000000-7f0000050000 rw-p 00000000 00:00 0
Pss:                  12 kB
Private_Dirty:        12 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Pss:                  24 kB
Private_Dirty:        24 kB
7ffc00100000-7ffc00102000 r-xp 00000000 00:00 0 [vdso]
Pss:                   0 kB
";
        let memory = Memory::parse(text);
        assert_eq!(memory.part(Part::Program), Use { pss: 100, dirty: 0 });
        assert_eq!(memory.part(Part::Data), Use { pss: 28, dirty: 24 });
        assert_eq!(memory.part(Part::Heap), Use { pss: 64, dirty: 68 });
        assert_eq!(memory.part(Part::Mapped).pss, 12);
        assert_eq!(memory.part(Part::Stack).pss, 24);
        assert_eq!((memory.pss(), memory.dirty()), (228, 128));
        assert!(
            memory.to_string().starts_with("228 KiB, 128 of its own: Program 100 (0), Data 28")
        );
    }

    #[test]
    fn a_process_has_a_heap_and_a_stack() {
        let memory = Memory::of(std::process::id().cast_signed()).unwrap();
        assert!(memory.part(Part::Stack).dirty > 0 && memory.part(Part::Program).pss > 0);
        assert!(memory.dirty() > 0 && memory.pss() >= memory.part(Part::Heap).pss);
        assert!(Memory::of(0).is_err());
    }
}
