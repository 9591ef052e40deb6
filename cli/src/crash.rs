//! What a crash prints: a panic or a fatal signal shows where it happened, also in a release build.
//!
//! The signal handler is not async-signal-safe: it takes a backtrace, which allocates. The process is lost
//! already, a second fault ends it at once (the handler is reset first), and an alarm ends it if the allocator's
//! lock was held; a backtrace that comes nearly always is worth more than none.

#![allow(unsafe_code)]

use std::{io::Write as _, process::ExitCode};

use anyhow::{Result, bail};

const FATAL: [(libc::c_int, &str); 5] = [
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGILL, "SIGILL"),
    (libc::SIGFPE, "SIGFPE"),
    (libc::SIGABRT, "SIGABRT"),
];

/// Installs the panic hook and the signal handlers.
pub(crate) fn install() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        if std::env::var_os("RUST_BACKTRACE").is_none() {
            let _ = writeln!(std::io::stderr(), "{}", std::backtrace::Backtrace::force_capture());
        }
        // Nobody may be reading.
        let _ = writeln!(
            std::io::stderr(),
            "clutch {}: this is a bug; please report it with the lines above",
            env!("CARGO_PKG_VERSION")
        );
    }));
    const STACK_BYTES: usize = 256 << 10;
    // Lives as long as the process, as an alternate stack must.
    let stack: &'static mut [u8] = Box::leak(vec![0u8; STACK_BYTES].into_boxed_slice());
    let handler: extern "C" fn(libc::c_int) = on_signal;
    // SAFETY: the structures are fully initialised before they are passed, the stack is valid for ever, and the
    // handler has the type that sigaction expects without SA_SIGINFO.
    unsafe {
        let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK_BYTES };
        libc::sigaltstack(&alternate, std::ptr::null_mut());
        for (signal, _) in FATAL {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            // Reset by the kernel: a second fault ends the process. Threads without an alternate stack use their own.
            action.sa_flags = libc::SA_ONSTACK | libc::SA_RESETHAND;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

extern "C" fn on_signal(signal: libc::c_int) {
    // SAFETY: alarm and signal have no preconditions.
    unsafe {
        libc::signal(libc::SIGALRM, libc::SIG_DFL);
        libc::alarm(10);
    }
    let name = FATAL.iter().find(|(s, _)| *s == signal).map_or("a signal", |(_, name)| name);
    let thread = std::thread::current();
    // Nobody may be reading.
    let _ = writeln!(
        std::io::stderr(),
        "clutch: fatal signal {name} in thread {:?}\n{:?}\nclutch {}: this is a bug; please report it with the lines above",
        thread.name().unwrap_or("?"),
        backtrace::Backtrace::new(),
        env!("CARGO_PKG_VERSION")
    );
    // SAFETY: the action was reset to the default, so this ends the process with the signal as its reason.
    unsafe {
        libc::raise(signal);
    }
}

/// Ends the process at once, without the destructors of C++ statics: threads that still work with them would fall over
/// what is destroyed, and a clean stop would look like a crash.
pub(crate) fn end(code: ExitCode) -> ! {
    // What cannot be written any more has been reported where it was printed.
    let _ = std::io::stdout().flush();
    let number = (0..=u8::MAX).find(|number| ExitCode::from(*number) == code).unwrap_or(1);
    // SAFETY: has no preconditions and does not return.
    unsafe { libc::_exit(i32::from(number)) }
}

/// Crashes on purpose, for the test of all this.
pub(crate) fn provoke(how: &str) -> Result<ExitCode> {
    match how {
        "panic" => panic!("provoked"),
        "segv" => provoke_segv(),
        other => bail!("{other:?}: say panic or segv"),
    }
}

#[inline(never)]
fn provoke_segv() -> Result<ExitCode> {
    // SAFETY: not safe, and that is the point: the address is never mapped.
    let byte = unsafe { std::ptr::read_volatile(std::hint::black_box(8 as *const u8)) };
    Ok(ExitCode::from(byte))
}
