// Package body implements the kinds of message bodies, and tells which of them can be written more than once.
package body

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"github.com/smtprelay/smtprelay/internal/moving"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// Bytes is a body of known size that can be written any number of times.
type Bytes []byte

// WriteTo implements io.WriterTo.
func (b Bytes) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(b)
	return int64(n), err
}

// Func is a body written by a function, which is called for each attempt.
type Func func(w io.Writer) error

// WriteTo implements io.WriterTo.
func (f Func) WriteTo(w io.Writer) (int64, error) {
	c := counter{w: w}
	err := f(&c)
	return c.n, err
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// Reader returns a body that copies r.
func Reader(r io.Reader) io.WriterTo {
	if b, ok := r.(*reader); ok {
		return b
	}
	return &reader{r}
}

// reader is a one-shot body. It implements io.Reader, by which Once recognizes it.
type reader struct{ io.Reader }

func (b *reader) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, moving.Reader(b.Reader)) // not the reader's own WriteTo, which could write to something else than w
}

// Once reports whether b, as returned by Again, can be written only once.
func Once(b io.WriterTo) bool {
	_, ok := b.(io.Reader)
	return ok
}

// Again returns a body that writes the same as b would write now, and can be written repeatedly if b allows it. A *bytes.Buffer
// is read in place. A file, or another reader in memory, is read from its current offset without moving the offset. For another
// io.Seeker, the offset is restored after each write. Any other b is returned unchanged.
func Again(b io.WriterTo) io.WriterTo {
	var source any = b
	if r, ok := b.(*reader); ok {
		source = r.Reader
	}
	switch r := source.(type) {
	case *bytes.Buffer:
		return Bytes(r.Bytes())
	case *bytes.Reader:
		return &section{r, r.Size() - int64(r.Len()), int64(r.Len()), true}
	case *strings.Reader:
		return &section{r, r.Size() - int64(r.Len()), int64(r.Len()), true}
	case *os.File:
		if at, err := r.Seek(0, io.SeekCurrent); err == nil {
			return &section{r, at, math.MaxInt64 - at, false}
		}
	case interface {
		io.Reader
		io.Seeker
	}:
		if at, err := r.Seek(0, io.SeekCurrent); err == nil {
			return &seeker{r, at, b}
		}
	}
	return b
}

// section is a body that does not move the offset of its source, so that several messages may share the source.
type section struct {
	r        io.ReaderAt
	at, n    int64
	inMemory bool
}

// WriteTo implements io.WriterTo.
func (s *section) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, io.LimitReader(io.NewSectionReader(s.r, s.at, s.n), s.n)) // with a LimitedReader, io.Copy allocates no larger buffer than needed
}

// seeker is a body that is written from the source's original offset, and restores that offset.
type seeker struct {
	s    io.Seeker
	at   int64
	body io.WriterTo
}

// WriteTo implements io.WriterTo.
func (s *seeker) WriteTo(w io.Writer) (n int64, err error) {
	if err = s.rewind(); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.rewind()) }() // otherwise the next Send would send only a part of the message
	return s.body.WriteTo(w)
}

func (s *seeker) rewind() error {
	at, err := s.s.Seek(s.at, io.SeekStart)
	if err == nil && at != s.at {
		err = fmt.Errorf("seek went to %d in place of %d", at, s.at)
	}
	if err != nil {
		return fmt.Errorf("the body cannot be read again from its beginning: %w", err)
	}
	return nil
}

// Size returns the size of b in canonical form (see wire.BodyWriter) if it is known before b is written; 0 otherwise.
func Size(b io.WriterTo) int64 {
	switch b := b.(type) {
	case Bytes:
		return wire.CanonicalSize(b)
	case *section:
		if b.inMemory {
			w := wire.NewBodyWriter(io.Discard, false)
			if _, err := b.WriteTo(w); err == nil && w.Close() == nil {
				return w.Size()
			}
		}
	}
	return 0
}
