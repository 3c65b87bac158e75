
#for matrix in {{ matrices }}
// Four entries of a line of {{ matrix }}, zeros past its ends.
fn {{ matrix }}_quad(line: u32, entry: u32, lines: u32, length: u32) -> vec4f {
    var quad = vec4f();
#if {{ matrix }}_vec4
    if (line < lines && entry < length) {
        quad = vec4f({{ matrix }}[(line * length + entry) / 4u]);
    }
#else
#for c in 0 1 2 3
    if (line < lines && entry + {{ c }}u < length) {
        quad[{{ c }}] = f32({{ matrix }}[line * length + entry + {{ c }}u]);
    }
#endfor
#endif
    return quad;
}

#endfor
