//! Everything that dials the loopback addresses of a namespace reaches one listener.
//!
//! The kernel asks a program (`BPF_PROG_TYPE_SK_LOOKUP`) which of a namespace's sockets a new
//! connection is for. Ours names a listener of ours for each that goes to 127.0.0.1 or ::1, whatever
//! the port, and has no opinion on others. The accepted socket's own address tells what was dialled.
//! The program is in place for as long as the descriptor of its link is open, or the namespace is
//! there: whoever is killed leaves nothing.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What was set up by [`catch`]; dropping it ends it.
#[derive(Debug)]
pub struct Caught {
    /// One for each family of addresses that the host has.
    pub listeners: Vec<TcpListener>,
    /// Keeps the program in place.
    pub link: OwnedFd,
}

/// Makes the listeners, and has all connections to loopback addresses of the namespace reach them. The
/// calling thread must be in that namespace.
///
/// # Errors
/// Those of bpf(2), where the kernel has no such programs as well, and of socket(2).
pub fn catch(netns: BorrowedFd<'_>) -> io::Result<Caught> {
    let map = make_map()?;
    let v4 = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    put(&map, KEY_V4, v4.as_fd())?;
    let mut listeners = vec![v4];
    // A host may have none of this family.
    if let Ok(v6) = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)) {
        put(&map, KEY_V6, v6.as_fd())?;
        listeners.push(v6);
    }
    let program = load(&program(&map))?;
    let link = attach(&program, netns)?;
    Ok(Caught { listeners, link })
}

/// Where the map has the listener of a family.
const KEY_V4: u32 = 0;
const KEY_V6: u32 = 1;

/// The kernel's `struct bpf_insn`, as a number.
#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u8,
    to: u8,
    from: u8,
    offset: i16,
    immediate: i32,
}

/// An offset that [`program`] replaces by the way to the end.
const TO_THE_END: i16 = i16::MAX;

/// Registers: a call's arguments begin with 1, its result is in 0, and it keeps 6 to 9.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const CONTEXT: u8 = 6;
const KEPT: u8 = 7;
const STACK: u8 = 10;

/// linux/bpf.h, `struct bpf_sk_lookup`: offsets of the fields that are looked at.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

const PROTOCOL_TCP: i32 = 6;
const FAMILY_INET6: i32 = 10;

/// linux/bpf.h, `enum bpf_func_id`
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// `SK_PASS`: go on, with the socket that was assigned if there was one.
const PASS: i32 = 1;

/// Codes of instructions: 32 bits from memory, 32 bits to memory, moves and sums of 64 bits, jumps.
const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const MOVE: u8 = 0xbf;
const SET: u8 = 0xb7;
const ADD: u8 = 0x07;
const GO: u8 = 0x05;
const GO_IF_EQUAL: u8 = 0x15;
const GO_IF_EQUAL_32: u8 = 0x16;
const GO_UNLESS_EQUAL_32: u8 = 0x56;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// Takes two instructions; with [`IS_MAP`] as its source the number is a map's descriptor.
const SET_64: u8 = 0x18;
const IS_MAP: u8 = 1;

/// The program, for little-endian machines like all of ours.
fn program(map: &OwnedFd) -> Vec<u64> {
    let load = |to, field| instruction(LOAD, to, CONTEXT, field, 0);
    let set = |to, value| instruction(SET, to, 0, 0, value);
    let copy = |to, from| instruction(MOVE, to, from, 0, 0);
    let call = |function| instruction(CALL, 0, 0, 0, function);
    let end_unless = |is: i32| instruction(GO_UNLESS_EQUAL_32, R2, 0, TO_THE_END, is);
    let v4 = [
        load(R2, LOCAL_IP4),
        end_unless(i32::from_le_bytes(Ipv4Addr::LOCALHOST.octets())),
        set(KEPT, KEY_V4.cast_signed()),
    ];
    let [a, b, c, d] = LOCAL_IP6;
    let v6 = [
        load(R2, a),
        end_unless(0),
        load(R2, b),
        end_unless(0),
        load(R2, c),
        end_unless(0),
        load(R2, d),
        end_unless(1_i32.to_be()),
        set(KEPT, KEY_V6.cast_signed()),
    ];
    let past = |part: &[Instruction]| i16::try_from(part.len()).unwrap_or(TO_THE_END);
    let mut all = vec![
        copy(CONTEXT, R1),
        load(R2, PROTOCOL),
        end_unless(PROTOCOL_TCP),
        load(R2, FAMILY),
        // Over the other family's part, and the jump at its end.
        instruction(GO_IF_EQUAL_32, R2, 0, past(&v4) + 1, FAMILY_INET6),
    ];
    all.extend(v4);
    all.push(instruction(GO, 0, 0, past(&v6), 0));
    all.extend(v6);
    all.extend([
        instruction(STORE, STACK, KEPT, -4, 0),
        copy(R2, STACK),
        instruction(ADD, R2, 0, 0, -4),
        instruction(SET_64, R1, IS_MAP, 0, map.as_raw_fd()),
        instruction(0, 0, 0, 0, 0),
        call(MAP_LOOKUP_ELEM),
        instruction(GO_IF_EQUAL, R0, 0, TO_THE_END, 0),
        copy(KEPT, R0),
        copy(R1, CONTEXT),
        copy(R2, KEPT),
        set(R3, 0),
        call(SK_ASSIGN),
        copy(R1, KEPT),
        call(SK_RELEASE),
    ]);
    let end = all.len();
    for (at, instruction) in all.iter_mut().enumerate() {
        if instruction.offset == TO_THE_END {
            // Jumps count from the instruction after them.
            instruction.offset = i16::try_from(end - at - 1).unwrap_or(TO_THE_END);
        }
    }
    all.extend([set(R0, PASS), instruction(EXIT, 0, 0, 0, 0)]);
    all.into_iter().map(Instruction::encode).collect()
}

fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        to,
        from,
        offset,
        immediate,
    }
}

impl Instruction {
    fn encode(self) -> u64 {
        let [low, high] = self.offset.to_le_bytes();
        let [a, b, c, d] = self.immediate.to_le_bytes();
        let registers = self.from << 4 | self.to;
        u64::from_le_bytes([self.code, registers, low, high, a, b, c, d])
    }
}

/// bpf(2): commands, and their parts of `union bpf_attr`.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

/// `BPF_MAP_TYPE_SOCKMAP`
const MAP_OF_SOCKETS: u32 = 15;
/// `BPF_PROG_TYPE_SK_LOOKUP`
const LOOKUP_PROGRAM: u32 = 30;
/// `BPF_SK_LOOKUP`
const LOOKUP: u32 = 36;

/// What a program calls itself that uses no function which is for GPL programs only.
const LICENSE: &std::ffi::CStr = c"Apache-2.0";

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries_max: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

fn make_map() -> io::Result<OwnedFd> {
    let attributes = MapCreate {
        kind: MAP_OF_SOCKETS,
        key_bytes: 4,
        value_bytes: 4,
        entries_max: 2,
    };
    // SAFETY: BPF_MAP_CREATE takes numbers only, and answers with a new descriptor.
    unsafe { bpf_descriptor(MAP_CREATE, &attributes) }
}

fn put(map: &OwnedFd, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = number(socket);
    let attributes = MapUpdate {
        map: number(map.as_fd()),
        padding: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: key and value are as long as the map has them, and outlive the call.
    unsafe { bpf(MAP_UPDATE_ELEM, &attributes) }.map(drop)
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut name = [0; 16];
    name[..NAME.len()].copy_from_slice(NAME);
    let attributes = ProgLoad {
        kind: LOOKUP_PROGRAM,
        instruction_count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
        instructions: instructions.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        name,
        attach_type: LOOKUP,
        ..ProgLoad::default()
    };
    // SAFETY: the instructions are as many as said, the licence ends with a zero, both outlive the call,
    // which answers with a new descriptor.
    unsafe { bpf_descriptor(PROG_LOAD, &attributes) }
}

/// What administrators see in their list of programs.
const NAME: &[u8] = b"husk_loopback";

fn attach(program: &OwnedFd, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = LinkCreate {
        program: number(program.as_fd()),
        target: number(netns),
        attach_type: LOOKUP,
        flags: 0,
    };
    // SAFETY: BPF_LINK_CREATE takes numbers only, and answers with a new descriptor.
    unsafe { bpf_descriptor(LINK_CREATE, &attributes) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// # Safety
/// `attributes` is the command's part of `union bpf_attr`, in which each pointer is valid for what the
/// command does with it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads no more than the size it is told; what it reads the caller vouches for.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// # Safety
/// That of [`bpf`]; and the command answers with a new descriptor.
unsafe fn bpf_descriptor<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for it.
    let result = unsafe { bpf(command, attributes)? };
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_lands_within_the_program() {
        let map = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let program = program(&map);
        let jumps = program.iter().enumerate().filter_map(|(at, word)| {
            let [code, _, low, high, ..] = word.to_le_bytes();
            let is_jump = matches!(code, GO | GO_IF_EQUAL | GO_IF_EQUAL_32 | GO_UNLESS_EQUAL_32);
            is_jump.then_some((at, i16::from_le_bytes([low, high])))
        });
        for (at, offset) in jumps {
            assert!(offset > 0, "{at} stays or goes back");
            assert!(at + 1 + usize::try_from(offset).unwrap() < program.len());
        }
    }
}
