// Package moving guards against an io.Reader that keeps returning no data and no error.
package moving

import "io"

// emptyReads is how many consecutive reads may return neither data nor an error, as in bufio.
const emptyReads = 100

// Reader returns a reader of r that fails with io.ErrNoProgress if r keeps returning 0 octets and no error. io.Copy and
// io.ReadFull would read from r forever.
func Reader(r io.Reader) io.Reader { return &reader{r: r} }

type reader struct {
	r     io.Reader
	empty int // consecutive empty reads
}

func (m *reader) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if n > 0 || err != nil || len(p) == 0 {
		m.empty = 0
		return n, err
	}
	if m.empty++; m.empty >= emptyReads {
		err = io.ErrNoProgress
	}
	return 0, err
}
