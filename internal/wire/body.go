package wire

import (
	"bytes"
	"io"
)

// BodyWriter writes a message in canonical form: bare CR and bare LF become CRLF, and the last line gets a CRLF if it has none.
// With dots it then doubles the dot of every line that begins with one (RFC 5321, 4.5.2), which DATA needs and BDAT does not.
// The order matters: a dot after a bare CR must be doubled too, otherwise the body could smuggle in another message.
type BodyWriter struct {
	w    io.Writer
	dots bool
	size int64 // octets of the canonical form that were written, without doubled dots
	took int64 // octets taken by Write
	cr   bool  // a CR was taken and its line is not ended yet: an LF may follow
	text bool  // the current line is not empty; says nothing while cr is set
}

// NewBodyWriter returns a BodyWriter that writes to w.
func NewBodyWriter(w io.Writer, dots bool) *BodyWriter { return &BodyWriter{w: w, dots: dots} }

// Reset sets b to the state after NewBodyWriter.
func (b *BodyWriter) Reset(w io.Writer, dots bool) { *b = BodyWriter{w: w, dots: dots} }

// Size returns the number of octets of the canonical form so far, as SIZE= counts them (RFC 1870, 5).
func (b *BodyWriter) Size() int64 { return b.size }

// Taken returns the number of octets passed to Write, before conversion.
func (b *BodyWriter) Taken() int64 { return b.took }

var (
	crlf = []byte("\r\n")
	dot  = []byte(".")
)

// Write implements io.Writer.
func (b *BodyWriter) Write(p []byte) (int, error) {
	rest := p
	for len(rest) > 0 {
		n, err := b.step(rest)
		rest = rest[n:]
		b.took += int64(n)
		if err != nil {
			return len(p) - len(rest), err
		}
	}
	return len(p), nil
}

// window is how many octets step examines at once. It bounds the search for CRLF, which would otherwise scan the rest of the
// body for every line if the body has other line ends.
const window = 4 << 10

// step writes a prefix of p and returns its length: all leading lines in canonical form, or one line that is not.
func (b *BodyWriter) step(p []byte) (int, error) {
	if b.cr {
		b.cr = false
		skip := 0
		if p[0] == '\n' {
			skip = 1
		}
		return skip, b.endLine()
	}
	if !b.text && b.dots && p[0] == '.' {
		if _, err := b.w.Write(dot); err != nil {
			return 0, err
		}
	}
	p = p[:min(len(p), window)]
	for n := 0; ; {
		line, end := p[n:], bytes.IndexByte(p[n:], '\n')
		if end >= 0 {
			line = line[:end]
		}
		switch cr := bytes.IndexByte(line, '\r'); {
		case cr >= 0 && cr == end-1: // CRLF already: the common case
			n += end + 1
			if n < len(p) && !(b.dots && p[n] == '.') {
				continue
			}
			b.text = false
			return n, b.put(p[:n])
		case cr >= 0:
			b.cr = true
			return n + cr + 1, b.put(p[:n+cr])
		case end >= 0:
			if err := b.put(p[:n+end]); err != nil {
				return n + end, err
			}
			return n + end + 1, b.endLine()
		}
		b.text = true
		return len(p), b.put(p)
	}
}

func (b *BodyWriter) put(p []byte) error {
	n, err := b.w.Write(p)
	b.size += int64(n)
	return err
}

func (b *BodyWriter) endLine() error {
	b.text = false
	return b.put(crlf)
}

// Close adds a missing CRLF to the last line. It neither closes the underlying writer nor writes the final dot.
func (b *BodyWriter) Close() error {
	if b.cr || b.text {
		b.cr = false
		return b.endLine()
	}
	return nil
}

// CanonicalSize returns the size of p in canonical form.
func CanonicalSize(p []byte) int64 {
	if !isCanonical(p) {
		b := BodyWriter{w: io.Discard}
		b.Write(p)
		b.Close()
		return b.size
	}
	size := int64(len(p))
	if size > 0 && p[size-1] != '\n' {
		size += int64(len(crlf))
	}
	return size
}

// isCanonical reports whether each CR and LF in p is part of a CRLF. It is much cheaper than writing p.
func isCanonical(p []byte) bool {
	lines := 0
	for rest := p; ; lines++ {
		end := bytes.IndexByte(rest, '\n')
		if end < 0 {
			return bytes.Count(p, crlf[:1]) == lines
		}
		if end == 0 || rest[end-1] != '\r' {
			return false
		}
		rest = rest[end+1:]
	}
}
