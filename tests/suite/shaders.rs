//! Every variant of every shader parses and validates. Needs no GPU.

use std::sync::LazyLock;

use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, Block, Expression, Function, Handle, Module, Statement};
use orpo_wgpu::ops::kernel::{Cut, Shader};

/// Every variant and its text, which takes longer to make than to look through.
static SHADERS: LazyLock<Vec<(Shader, String)>> =
    LazyLock::new(|| Shader::all().into_iter().map(|shader| (shader, shader.wgsl())).collect());

#[test]
fn every_variant_validates() {
    let capabilities =
        Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX | Capabilities::SUBGROUP;
    for (shader, source) in &*SHADERS {
        let module = naga::front::wgsl::parse_str(source)
            .unwrap_or_else(|e| panic!("{shader:?}: {}", e.emit_to_string(source)));
        Validator::new(ValidationFlags::all(), capabilities)
            .validate(&module)
            .unwrap_or_else(|e| panic!("{shader:?}: {}", e.emit_to_string(source)));

        let [entry] = module.entry_points.as_slice() else { panic!("{shader:?}: one entry point") };
        assert_eq!(entry.name, "main", "{shader:?}");
        assert_eq!(entry.workgroup_size, [shader.workgroup_size(), 1, 1], "{shader:?}");
        assert!((8..=256).contains(&shader.workgroup_size()), "{shader:?}: {}", shader.workgroup_size());
    }
}

#[test]
fn no_variant_asks_for_more_than_every_device_has() {
    for (shader, source) in &*SHADERS {
        let module = naga::front::wgsl::parse_str(source).unwrap();
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let (mut workgroup_bytes, mut n_storage) = (0, 0);
        for (_, variable) in module.global_variables.iter() {
            match variable.space {
                AddressSpace::WorkGroup => workgroup_bytes += layouter[variable.ty].size,
                AddressSpace::Storage { access } => {
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
        let may_take = match shader {
            Shader::Product { cut: Cut::Matrices(tile), .. } => tile.shared_bytes(),
            _ => 16_384,
        };
        assert!(workgroup_bytes <= may_take, "{shader:?}: {workgroup_bytes} bytes of workgroup memory");
        assert!(n_storage <= 8, "{shader:?}: {n_storage} storage buffers");
    }
}

/// naga gives a variable without a value its zero once a function, not once a turn of the loop that it stands in.
#[test]
fn every_variable_of_a_function_has_a_value() {
    for (shader, source) in &*SHADERS {
        for line in source.lines().filter(|line| line.starts_with("    ")) {
            let is_bare = line.trim_start().starts_with("var ") && !line.contains('=');
            assert!(!is_bare, "{shader:?}: {line}");
        }
    }
}

/// What a value comes of, by what it takes most to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    /// Literals alone.
    Source,
    /// Parameters, which are known at a launch.
    Parameters,
    Anything,
}

/// A function's stores to variables, pointer and value, and the conditions of its branches.
#[derive(Default)]
struct Flow {
    stores: Vec<[Handle<Expression>; 2]>,
    conditions: Vec<Handle<Expression>>,
}

impl Flow {
    fn add(&mut self, block: &Block) {
        for statement in block {
            match statement {
                Statement::Store { pointer, value } => self.stores.push([*pointer, *value]),
                Statement::Block(inner) => self.add(inner),
                Statement::If { condition, accept, reject } => {
                    self.conditions.push(*condition);
                    self.add(accept);
                    self.add(reject);
                }
                Statement::Loop { body, continuing, break_if } => {
                    self.conditions.extend(break_if);
                    self.add(body);
                    self.add(continuing);
                }
                _ => {}
            }
        }
    }
}

/// The origin of each expression of a function; of a variable, that of all that is ever put into it.
fn origins(module: &Module, function: &Function, stores: &[[Handle<Expression>; 2]]) -> Vec<Origin> {
    let mut variables = vec![Origin::Source; function.local_variables.len()];
    loop {
        let mut origins = vec![Origin::Anything; function.expressions.len()];
        for (handle, expression) in function.expressions.iter() {
            let of = |parts: &[Option<Handle<Expression>>]| {
                let parts = parts.iter().flatten().map(|part| origins[part.index()]);
                parts.max().unwrap_or(Origin::Source)
            };
            origins[handle.index()] = match *expression {
                Expression::Literal(_) | Expression::Constant(_) | Expression::ZeroValue(_) => Origin::Source,
                Expression::GlobalVariable(global)
                    if module.global_variables[global].space == AddressSpace::Uniform =>
                {
                    Origin::Parameters
                }
                Expression::LocalVariable(variable) => variables[variable.index()],
                Expression::AccessIndex { base, .. } => of(&[Some(base)]),
                Expression::Load { pointer } => of(&[Some(pointer)]),
                Expression::Unary { expr, .. } | Expression::As { expr, .. } => of(&[Some(expr)]),
                Expression::Binary { left, right, .. } => of(&[Some(left), Some(right)]),
                Expression::Math { arg, arg1, arg2, .. } => of(&[Some(arg), arg1, arg2]),
                _ => Origin::Anything,
            };
        }
        let before = variables.clone();
        for [pointer, value] in stores {
            if let Expression::LocalVariable(variable) = function.expressions[*pointer] {
                let variable = &mut variables[variable.index()];
                *variable = (*variable).max(origins[value.index()]);
            }
        }
        if variables == before {
            return origins;
        }
    }
}

/// Mesa's software adapter would compile the shader anew for each launch, with the values of its parameters.
#[test]
fn no_branch_depends_on_parameters_alone() {
    for (shader, source) in &*SHADERS {
        let module = naga::front::wgsl::parse_str(source).unwrap();
        let functions = module.functions.iter().map(|(_, function)| function);
        for function in functions.chain(module.entry_points.iter().map(|entry| &entry.function)) {
            let mut flow = Flow::default();
            flow.add(&function.body);
            let origins = origins(&module, function, &flow.stores);
            let mut conditions = flow.conditions.iter().map(|condition| origins[condition.index()]);
            assert!(
                !conditions.any(|origin| origin == Origin::Parameters),
                "{shader:?}: {:?}",
                function.name
            );
        }
    }
}
