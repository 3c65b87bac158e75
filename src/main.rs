//! The `orpo-wgpu` binary: runs the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    quiet_mesa();
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
