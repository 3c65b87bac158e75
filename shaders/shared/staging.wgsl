
// How those products of src/ops/lora_linear.rs that stage their operands read them.

#for matrix in {{ matrices }}
#if {{ matrix }}_f16
alias {{ matrix }}_stored = vec4<f16>;
#else
alias {{ matrix }}_stored = vec4f;
#endif

// Four entries of a line of {{ matrix }}, as they are stored. Past the last line they are the last line's, and past a line's end its
// last entry or quad, so that no branch keeps the loads of a step from being under way together. Of a matrix without entries, in whose
// place another buffer stands, they are the first there, and not used.
//
// A thread reads its quads of a step while the one before is multiplied, and does nothing to them until they are staged: what would have
// to wait for a load stands behind the products.
fn {{ matrix }}_near(line: u32, entry: u32, lines: u32, length: u32) -> {{ matrix }}_stored {
    let nearest = min(line, max(lines, 1u) - 1u);
    let last = select(0u, max(length, 1u) - 1u, lines > 0u);
#if {{ matrix }}_vec4
    return {{ matrix }}[nearest * (length / 4u) + min(entry / 4u, last / 4u)];
#else
    let begin = nearest * length;
    return vec4({{ matrix }}[begin + min(entry, last)], {{ matrix }}[begin + min(entry + 1u, last)],
        {{ matrix }}[begin + min(entry + 2u, last)], {{ matrix }}[begin + min(entry + 3u, last)]);
#endif
}

#endfor
