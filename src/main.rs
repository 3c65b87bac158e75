//! The `orpo-wgpu` binary: runs the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    quiet_mesa();
    keep_freed_memory();
    orpo_wgpu::cli::main(std::env::args_os())
}

/// Keeps Mesa's device-selection layer, which looks for a Wayland display, from complaining where there cannot be one.
fn quiet_mesa() {
    const LAYER_OFF: &str = "NODEVICE_SELECT";
    let is_set = |name| std::env::var_os(name).is_some();
    let is_wanted = ["XDG_RUNTIME_DIR", "MESA_VK_DEVICE_SELECT", LAYER_OFF].into_iter().any(is_set);
    if cfg!(target_os = "linux") && !is_wanted {
        #[expect(unsafe_code, reason = "the environment is how Mesa's layer is told")]
        // SAFETY: the process has no second thread yet.
        unsafe {
            std::env::set_var(LAYER_OFF, "1");
        }
    }
}

/// Lets glibc use the memory of a tensor again that was freed. It would give each of more than 32 MiB pages of its own, of which the kernel
/// clears every one when it is first touched. Before 2.35 it takes no threshold above these 32 MiB, and stays as it is.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[expect(unsafe_code, reason = "the C library's allocator is told through a function of it")]
    // SAFETY: these are settings, and one that is not taken changes nothing.
    unsafe {
        // The second alone would hold the first where it starts, at 128 KiB.
        if libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 20) == 1 {
            libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
        }
    }
}
