//! The log as TensorBoard event files.
//!
//! A file is a row of TFRecords, each an `Event` message of `tensorflow/core/util/event.proto`. Nine fields of four messages are all
//! that scalars need, so they are encoded here: the crates that do it bring a protobuf compiler or an image decoder along.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Numbers of the fields of `Event` that carry its content.
const FILE_VERSION: u64 = 3;
const SUMMARY: u64 = 5;
const SESSION_LOG: u64 = 7;

/// `SessionLog { status: START }`
const SESSION_START: [u8; 2] = [0x08, 0x01];

/// An open event file.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
    session: Session,
    /// The step from which on the file takes over.
    first_step: u64,
}

/// Whether the file has told its readers where it takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    Unannounced,
    Started,
}

impl TensorBoard {
    /// Opens a new event file in the folder `runs` of the run folder; files of earlier processes stay beside it, and hold up to
    /// `first_step`.
    ///
    /// # Errors
    /// If it cannot be created or written.
    pub fn create(folder: &Path, first_step: usize) -> Result<Self> {
        let folder = folder.join("runs");
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let wall_time = wall_time();
        // Readers take the files of a folder in the order of their names, hence the seconds first, in ten digits.
        let name = format!("events.out.tfevents.{:010}.{}.orpo-wgpu", wall_time as u64, host_name());
        let mut n = 0;
        let (path, file) = loop {
            let path = folder.join(format!("{name}.{}.{n}", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => n += 1,
                Err(e) => return Err(Error::io("create", &path)(e)),
            }
        };
        let mut board = Self { path, file, session: Session::Unannounced, first_step: first_step as u64 };
        board.write(&record(&event(wall_time, 0, FILE_VERSION, b"brain.Event:2")))?;
        Ok(board)
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the scalars of a line of `logging.jsonl`, see [`tagged`]; they are in the file when this returns.
    ///
    /// The first line also announces the start of a session: TensorBoard then forgets what a process that was interrupted had written to
    /// another file from the first step on.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn scalars(&mut self, step: usize, line: &Map<String, Value>) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in tagged(line) {
            put_scalar(&mut summary, &tag, value as f32);
        }
        if summary.is_empty() {
            return Ok(());
        }
        let (wall_time, step) = (wall_time(), step as u64);
        let mut records = Vec::new();
        if self.session == Session::Unannounced {
            records = record(&event(wall_time, self.first_step, SESSION_LOG, &SESSION_START));
        }
        records.extend(record(&event(wall_time, step, SUMMARY, &summary)));
        self.write(&records)?;
        self.session = Session::Started;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io("write", &self.path)(e))
    }
}

/// The scalars of a line of `logging.jsonl` under their tags, in the line's order.
///
/// The tags are those of the TensorBoard callback of Hugging Face's `transformers` (`rewrite_logs`): `eval_loss` is `eval/loss`, every
/// other key is below `train/`. The step is no scalar; neither is a `null`, which stands for a number that is not finite.
pub fn tagged(line: &Map<String, Value>) -> impl Iterator<Item = (String, f64)> {
    line.iter().filter(|(key, _)| *key != "step").filter_map(|(key, value)| {
        let tag = match key.strip_prefix("eval_") {
            Some(key) => format!("eval/{key}"),
            None => format!("train/{key}"),
        };
        Some((tag, value.as_f64()?))
    })
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// A name for this machine that fits into a file name; it only helps people to tell files apart.
fn host_name() -> String {
    let name = ["COMPUTERNAME", "HOSTNAME"].iter().find_map(|name| std::env::var(name).ok());
    let name = name.or_else(|| fs::read_to_string("/proc/sys/kernel/hostname").ok()).unwrap_or_default();
    let name: String = name
        .trim()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' })
        .take(64)
        .collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

/// `Event { wall_time = 1: double, step = 2: int64, field: payload }`
fn event(wall_time: f64, step: u64, field: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(wall_time.to_le_bytes());
    if step > 0 {
        out.push(2 << 3);
        put_varint(&mut out, step);
    }
    put_bytes(&mut out, field, payload);
    out
}

/// A value of a summary: `Value { tag = 1: string, simple_value = 2: float }`
fn put_scalar(summary: &mut Vec<u8>, tag: &str, value: f32) {
    let mut scalar = Vec::new();
    put_bytes(&mut scalar, 1, tag.as_bytes());
    scalar.push(2 << 3 | 5);
    scalar.extend(value.to_le_bytes());
    put_bytes(summary, 1, &scalar);
}

/// A string or message field of a protobuf message: key, length, bytes.
fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(out, field << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// Seven bits a byte, low ones first, the top bit set on all but the last.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A TFRecord: length, masked CRC of the length, data, masked CRC of the data (`tensorflow/core/lib/io/record_writer.cc`).
fn record(data: &[u8]) -> Vec<u8> {
    let mut out = (data.len() as u64).to_le_bytes().to_vec();
    out.extend(masked_crc32c(&out).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc32c(data).to_le_bytes());
    out
}

/// The CRC rotated and shifted, so that a CRC of data that holds CRCs stays a good one (`tensorflow/core/lib/hash/crc32c.h`).
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli, RFC 3720), bit by bit: a line of the log is under a kilobyte.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc: u32, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Records written by the Python package `tensorboard` 2.21 (`tensorboard.summary.writer.record_writer`).
    const FROM_PYTHON: [&str; 3] = [
        "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c",
        "100000000000000095fbfe1809000000000000f83f10ac023a020801713b788a",
        "3e00000000000000d9d240e709000000000000f83f10ac022a300a110a0a747261696e2f6c6f7373150000803e0a1b0a14657661\
         6c2f726577617264732f6d617267696e7315000020c03a141b11",
    ];

    fn line(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    /// The data of every record, lengths and CRCs held against it.
    fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
            assert_eq!(crc(8), masked_crc32c(&file[..8]));
            assert_eq!(crc(12 + length), masked_crc32c(&file[12..12 + length]));
            all.push(file[12..12 + length].to_vec());
            file = &file[16 + length..];
        }
        all
    }

    /// A message's fields: numbers, wire types and contents, scalars as little-endian bytes.
    fn fields(mut message: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
        fn varint(message: &mut &[u8]) -> u64 {
            let n = message.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
            let (bytes, rest) = message.split_at(n);
            *message = rest;
            bytes.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f))
        }
        let mut all = Vec::new();
        while !message.is_empty() {
            let key = varint(&mut message);
            let length = match key & 7 {
                0 => {
                    all.push((key >> 3, 0, varint(&mut message).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => varint(&mut message) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            all.push((key >> 3, key & 7, message[..length].to_vec()));
            message = &message[length..];
        }
        all
    }

    /// `(step, tag, value)` of every scalar of a file.
    fn read_scalars(path: &Path) -> Vec<(u64, String, f32)> {
        let mut all = Vec::new();
        for record in records(&fs::read(path).unwrap()) {
            let event = fields(&record);
            let step = event
                .iter()
                .find(|f| f.0 == 2)
                .map_or(0, |f| u64::from_le_bytes(f.2[..].try_into().unwrap()));
            for (_, _, summary) in event.iter().filter(|f| f.0 == SUMMARY) {
                for (_, _, value) in fields(summary) {
                    let value = fields(&value);
                    let tag = String::from_utf8(value[0].2.clone()).unwrap();
                    all.push((step, tag, f32::from_le_bytes(value[1].2[..].try_into().unwrap())));
                }
            }
        }
        all
    }

    #[test]
    fn crc_of_the_test_vectors_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|i| i as u8)), 0x46dd_794e);
    }

    #[test]
    fn records_are_those_of_tensorboard_to_the_byte() {
        let mut summary = Vec::new();
        for (tag, value) in [("train/loss", 0.25f32), ("eval/rewards/margins", -2.5)] {
            put_scalar(&mut summary, tag, value);
        }
        let events = [
            event(1.5, 0, FILE_VERSION, b"brain.Event:2"),
            event(1.5, 300, SESSION_LOG, &SESSION_START),
            event(1.5, 300, SUMMARY, &summary),
        ];
        for (event, expected) in events.iter().zip(FROM_PYTHON) {
            let hex: String = record(event).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, expected);
        }
    }

    #[test]
    fn lines_are_read_back_as_they_were_logged() {
        let run = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(run.path(), 5).unwrap();
        let first = json!({"step": 5, "epoch": 0.5, "loss": 1.5, "rewards/chosen": -0.25, "grad_norm": null});
        board.scalars(5, &line(first)).unwrap();
        let read = |tag: &str| {
            let all = read_scalars(board.path()).into_iter().filter(|s| s.1 == tag);
            all.map(|(step, _, value)| (step, value)).collect::<Vec<_>>()
        };
        assert_eq!(read("train/loss"), [(5, 1.5)], "the line is there before the file is closed");
        board
            .scalars(
                200,
                &line(json!({"step": 200, "epoch": 1.0, "eval_loss": 1, "eval_logps/chosen": -3.0})),
            )
            .unwrap();
        board.scalars(201, &line(json!({"step": 201}))).unwrap();

        let tags: Vec<_> = read_scalars(board.path()).into_iter().map(|(step, tag, _)| (step, tag)).collect();
        let expected = [
            (5, "train/epoch"),
            (5, "train/loss"),
            (5, "train/rewards/chosen"),
            (200, "train/epoch"),
            (200, "eval/loss"),
            (200, "eval/logps/chosen"),
        ];
        assert_eq!(tags, expected.map(|(step, tag)| (step, tag.to_owned())));
        let contents: Vec<Vec<u64>> = records(&fs::read(board.path()).unwrap())
            .iter()
            .map(|record| fields(record).iter().map(|f| f.0).collect())
            .collect();
        let expected =
            [vec![1, FILE_VERSION], vec![1, 2, SESSION_LOG], vec![1, 2, SUMMARY], vec![1, 2, SUMMARY]];
        assert_eq!(contents, expected);
    }

    /// A run that goes on may evaluate again after the step that the last line before is of.
    #[test]
    fn a_session_starts_where_it_is_told() {
        let run = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(run.path(), 51).unwrap();
        board.scalars(50, &line(json!({"step": 50, "eval_loss": 1}))).unwrap();
        let contents = fs::read(board.path()).unwrap();
        let session = record(&event(0.0, 51, SESSION_LOG, &SESSION_START));
        // All of the event but its time, which comes first, and the sums around it.
        let (step, sums) = (8 + 4 + 9, 4);
        let wanted = &session[step..session.len() - sums];
        assert!(contents.windows(wanted.len()).any(|part| part == wanted));
    }

    #[test]
    fn a_second_file_leaves_the_first_alone() {
        let run = tempfile::tempdir().unwrap();
        let first = TensorBoard::create(run.path(), 0).unwrap();
        let second = TensorBoard::create(run.path(), 0).unwrap();
        assert_ne!(first.path(), second.path());
        for board in [first, second] {
            let name = board.path().file_name().unwrap().to_str().unwrap();
            assert!(name.starts_with("events.out.tfevents.") && name.contains(".orpo-wgpu."), "{name}");
            assert!(board.path().parent().unwrap().ends_with("runs"));
        }
    }
}
