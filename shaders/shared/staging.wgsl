
// How those products of src/ops/lora_linear.rs that stage their operands read them.

#for matrix in {{ matrices }}
#if {{ matrix }}_f16
alias {{ matrix }}_quad = vec4<f16>;
#else
alias {{ matrix }}_quad = vec4f;
#endif

// Four entries of a line of {{ matrix }}, as they are stored. Past the last line they are the last line's, and past a line's end its
// last: without a branch, all loads of a step are under way at once, and what follows from a thread's place alone is known before the
// first step. Of a matrix without entries, whose buffer stands in, it is the first, and not used.
fn {{ matrix }}_near(line: u32, entry: u32, lines: u32, length: u32) -> {{ matrix }}_quad {
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
