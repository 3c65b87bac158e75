//! Every variant of every shader parses and validates. Needs no GPU.

use naga::valid::{Capabilities, ValidationFlags, Validator};
use orpo_wgpu::ops::kernel::Shader;

#[test]
fn every_variant_validates() {
    let capabilities =
        Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX | Capabilities::SUBGROUP;
    for shader in Shader::all() {
        let source = shader.wgsl();
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|e| panic!("{shader:?}: {}", e.emit_to_string(&source)));
        Validator::new(ValidationFlags::all(), capabilities)
            .validate(&module)
            .unwrap_or_else(|e| panic!("{shader:?}: {}", e.emit_to_string(&source)));

        let [entry] = module.entry_points.as_slice() else { panic!("{shader:?}: one entry point") };
        assert_eq!(entry.name, "main", "{shader:?}");
        assert_eq!(entry.workgroup_size, [shader.workgroup_size(), 1, 1], "{shader:?}");
        assert!((8..=256).contains(&shader.workgroup_size()), "{shader:?}: {}", shader.workgroup_size());
    }
}

#[test]
fn no_variant_asks_for_more_than_every_device_has() {
    for shader in Shader::all() {
        let module = naga::front::wgsl::parse_str(&shader.wgsl()).unwrap();
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let (mut workgroup_bytes, mut n_storage) = (0, 0);
        for (_, variable) in module.global_variables.iter() {
            match variable.space {
                naga::AddressSpace::WorkGroup => workgroup_bytes += layouter[variable.ty].size,
                naga::AddressSpace::Storage { access } => {
                    n_storage += 1;
                    // Tensors are slices of shared buffers, and wgpu refuses one buffer bound both ways.
                    assert_eq!(
                        access,
                        naga::StorageAccess::LOAD | naga::StorageAccess::STORE,
                        "{shader:?}: {:?} is not read_write",
                        variable.name
                    );
                }
                _ => {}
            }
        }
        assert!(workgroup_bytes <= 16_384, "{shader:?}: {workgroup_bytes} bytes of workgroup memory");
        assert!(n_storage <= 8, "{shader:?}: {n_storage} storage buffers");
    }
}

/// naga gives a variable without a value its zero once a function, not once a turn of the loop that it stands in.
#[test]
fn every_variable_of_a_function_has_a_value() {
    for shader in Shader::all() {
        for line in shader.wgsl().lines().filter(|line| line.starts_with("    ")) {
            let is_bare = line.trim_start().starts_with("var ") && !line.contains('=');
            assert!(!is_bare, "{shader:?}: {line}");
        }
    }
}
