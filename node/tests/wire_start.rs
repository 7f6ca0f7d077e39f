//! What a shard says when it cannot start. Each case runs in a child process of its own, because limits
//! and filters cannot be taken back.
#![allow(unsafe_code, reason = "filters and limits are set by system calls")]

mod wire_support;

use std::process::Command;

use ringmain::io::{
    KernelFacts, Mesh, ShardOptions, ShardParts, StartError, cores, probe_kernel, raise_nofile,
    slots_allowed, spawn_shard, table_slots,
};
use wire_support::engine::{Echo, TestEngine};

/// Names the case that a child process runs.
const CASE: &str = "RINGMAIN_WIRE_START_CASE";

/// Tries to start a shard and gives what it says.
fn start(options: ShardOptions) -> Result<(), StartError> {
    let parts = ShardParts::<TestEngine<Echo>> {
        listeners: Vec::new(),
        mesh: Mesh::new(1, 4).unwrap(),
        answers: Box::new(|_| {}),
        events: Box::new(|_| {}),
    };
    let shard = spawn_shard(options, parts, || TestEngine::new(Echo::default()))?;
    shard.stop();
    shard.join().expect("the shard panicked");
    Ok(())
}

/// The child's side: spoils something and prints what the start says.
#[test]
fn in_a_spoilt_process() {
    let Ok(case) = std::env::var(CASE) else { return };
    match case.as_str() {
        "seccomp" => refuse_io_uring(libc::EPERM as u32),
        "no io_uring" => refuse_io_uring(libc::ENOSYS as u32),
        "few descriptors" => limit(libc::RLIMIT_NOFILE, 100),
        "little memory" => limit(libc::RLIMIT_MEMLOCK, 65_536),
        other => panic!("no case {other}"),
    }
    let started = start(ShardOptions::new(0, 1_000));
    println!("SAYS: {}", started.map_or_else(|error| error.to_string(), |()| "started".into()));
}

/// Runs this test binary again with a case, and gives what the start said there.
fn says(case: &str) -> String {
    let binary = std::env::current_exe().unwrap();
    let output = Command::new(binary)
        .args(["--exact", "in_a_spoilt_process", "--nocapture"])
        .env(CASE, case)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = text.lines().find_map(|line| line.split_once("SAYS: "));
    said.unwrap_or_else(|| panic!("{case}: {text}{}", String::from_utf8_lossy(&output.stderr))).1.to_owned()
}

#[test]
fn a_seccomp_filter_is_named() {
    let said = says("seccomp");
    assert!(said.contains("seccomp") && said.contains("io_uring_setup"), "{said}");
}

#[test]
fn a_kernel_without_io_uring_is_named() {
    let said = says("no io_uring");
    assert!(said.contains("too old") && said.contains(&KernelFacts::read().release), "{said}");
}

#[test]
fn a_table_above_the_limit_of_descriptors_is_named() {
    let said = says("few descriptors");
    assert!(said.contains("the limit is 100") && said.contains("ulimit -n"), "{said}");
}

#[test]
fn too_little_lockable_memory_is_named() {
    let said = says("little memory");
    assert!(said.contains("64 KiB") && said.contains("LimitMEMLOCK"), "{said}");
}

#[test]
fn a_core_outside_the_cpuset_is_named() {
    let options = ShardOptions { core: Some(4_000), ..ShardOptions::new(0, 10) };
    let error = start(options).unwrap_err();
    assert!(matches!(error, StartError::Core { core: 4_000, .. }), "{error}");
    for core in cores() {
        start(ShardOptions { core: Some(core), ..ShardOptions::new(0, 10) }).unwrap();
    }
}

#[test]
fn the_probe_agrees_with_the_start() {
    let limit = raise_nofile();
    let slots_max = slots_allowed(u32::MAX, &limit, 0);
    probe_kernel(table_slots(slots_max, 0)).unwrap();
    start(ShardOptions::new(0, slots_max)).unwrap();
    if limit.soft < 1 << 20 {
        assert!(matches!(probe_kernel(table_slots(slots_max, 0) + 1), Err(StartError::Descriptors { .. })));
    }
}

/// Makes io_uring_setup fail with `errno`, for good.
fn refuse_io_uring(errno: u32) {
    // Load the system call's number; if it is io_uring_setup's, answer `errno`; allow all others
    // (seccomp(2), linux/filter.h). The number is the same on every architecture.
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        step((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, 0),
        step((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, 0, 1, libc::SYS_io_uring_setup as u32),
        step((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
        step((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: plain numbers, and a filter that lives for the call. All threads get it: the shard's is made
    // after this and inherits it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let done = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter);
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
}

fn limit(resource: libc::__rlimit_resource_t, value: u64) {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the limit lives for the call.
    assert_eq!(unsafe { libc::setrlimit(resource, &raw const limit) }, 0);
}
