package pmem

// choices is every combination of flush instruction and copy width that the
// CPU under test has.
func choices() []primitives {
	out := []primitives{{}}
	for _, f := range availableFlushes() {
		for _, w := range availableWidths() {
			out = append(out, primitives{flush: f, width: w})
		}
	}
	return out
}
