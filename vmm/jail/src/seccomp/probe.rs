//! Finds out what the kernel makes of a list, in processes that may die of it. For tests.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use seccompiler::{BpfProgram, apply_filter};

use super::{Call, List};

/// No call has a higher number: 470 are known now.
const LAST: i64 = 512;
/// Not calls of programs but of the kernel's own breakpoints (uretprobe, uprobe): it filters them no more
/// since 6.14, and ends who calls them elsewhere.
const BREAKPOINTS: [i64; 2] = [335, 336];
/// Marks the calls of another ABI of the same processor, where the kernel has it.
const X32: i64 = 1 << 30;
/// No descriptor, process, address or size that a call could do anything with.
const NOTHING: i64 = 0x7fff_fffe;

/// Asserts that the kernel lets pass what is listed and kills at all else: each other number, each
/// number of the other ABIs, and each change of one bit of an argument that is checked.
///
/// # Panics
/// When it does not.
pub fn assert_exact(list: &List) {
    let calls = list.calls();
    let process = Probe::new(list);
    let check = |number: i64, arguments: [i64; 6]| {
        let allowed = calls.iter().any(|call| call.allows(number, arguments));
        assert_eq!(
            process.survives(number, arguments),
            allowed,
            "{}: call {number} with {arguments:x?}",
            list.threads
        );
    };
    for number in (0..=LAST).filter(|number| !BREAKPOINTS.contains(number)) {
        check(number, [NOTHING; 6]);
        check(number | X32, [NOTHING; 6]);
    }
    for call in &calls {
        let right = call.arguments();
        check(call.number, right);
        assert!(calls.iter().any(|call| call.allows(call.number, right)));
        for argument in call.checks().map(|check| usize::from(check.argument)) {
            for bit in 0..32 {
                let mut wrong = right;
                wrong[argument] ^= 1 << bit;
                check(call.number, wrong);
            }
        }
    }
    assert!(!process.survives_old_abi(), "{}: int 0x80", list.threads);
}

impl Call {
    fn allows(&self, number: i64, arguments: [i64; 6]) -> bool {
        number == self.number
            && self.checks().all(|check| {
                let value = arguments[usize::from(check.argument)] as u32;
                value & check.mask == check.bits
            })
    }

    /// Arguments that pass the checks, and lead to nothing otherwise.
    fn arguments(&self) -> [i64; 6] {
        let mut arguments = [NOTHING; 6];
        for check in self.checks() {
            arguments[usize::from(check.argument)] = 0;
        }
        for check in self.checks() {
            arguments[usize::from(check.argument)] |= i64::from(check.bits);
        }
        arguments
    }
}

/// Makes calls in processes of their own, under a list.
struct Probe {
    programs: Vec<BpfProgram>,
    /// Shared with those processes.
    survived: *mut AtomicU32,
}

impl Probe {
    fn new(list: &List) -> Self {
        let programs = list.programs().expect("the list makes programs");
        // SAFETY: a new mapping, of nothing else.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self {
            programs,
            survived: page.cast(),
        }
    }

    /// Whether a call returns, or ends its process in another way than as one that is not allowed.
    fn survives(&self, number: i64, arguments: [i64; 6]) -> bool {
        let [a, b, c, d, e, f] = arguments;
        // SAFETY: the arguments name no memory, descriptor or process of this one.
        self.run(|| unsafe {
            libc::syscall(number, a, b, c, d, e, f);
        })
    }

    /// The same of getpid(2) as 32-bit programs call it.
    fn survives_old_abi(&self) -> bool {
        // SAFETY: the call has no arguments and changes the register of its result alone.
        self.run(|| unsafe {
            std::arch::asm!("int 0x80", inlateout("eax") 20 => _);
        })
    }

    fn run(&self, call: impl FnOnce()) -> bool {
        // SAFETY: the page is mapped as long as this lives.
        let survived = unsafe { &*self.survived };
        survived.store(0, Ordering::SeqCst);
        // SAFETY: the child takes no lock and no memory, and ends below.
        let child = unsafe { libc::fork() };
        assert_ne!(child, -1, "{}", io::Error::last_os_error());
        if child == 0 {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: the limit outlives the call.
            unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
            if self.programs.iter().all(|it| apply_filter(it).is_ok()) {
                call();
                survived.store(1, Ordering::SeqCst);
            }
            // SAFETY: the process ends here, if only because that is not allowed.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: the status outlives the call.
        while unsafe { libc::waitpid(child, &raw mut status, 0) } != child {}
        let refused = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS;
        !refused || survived.load(Ordering::SeqCst) == 1
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // SAFETY: the page was mapped in `new`, and nobody has a reference to it.
        unsafe { libc::munmap(self.survived.cast(), 4096) };
    }
}
