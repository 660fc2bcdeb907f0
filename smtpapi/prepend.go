package smtpapi

import (
	"bytes"
	"errors"
	"io"

	bodies "github.com/smtprelay/smtprelay/internal/body"
	"github.com/smtprelay/smtprelay/internal/moving"
)

var errContinued = errors.New("smtpapi: the message begins with white space, which would continue the X-SMTPAPI field")

// Prepend returns a message body that writes h's field and then body, which holds a whole message: header, empty line, text.
// Nothing of body is kept. The field comes first, and of several X-SMTPAPI fields SendGrid reads the first.
//
// h is marshalled at once and may be changed afterwards. If it has mistakes, writing the result fails with the error of
// [Header.Check] before anything is written: call Check first to learn of them without a relay.
//
// The result can be written as often as body can. A body that can seek is written from where it stands now, each time, and a
// *bytes.Buffer is read in place: see smtprelay.Reader. The result is an io.Reader, used up by writing, if and only if body is one
// that can be read only once. If body fails before its first byte, or is empty, the field is not written either. A nil body gives
// nil.
func Prepend(h Header, body io.WriterTo) io.WriterTo {
	if body == nil {
		return nil
	}
	field, err := h.Marshal()
	body = bodies.Again(body)
	if r, ok := body.(io.Reader); ok {
		return &readOnce{field: field, body: moving.Reader(r), err: err}
	}
	return &prepended{field: field, body: body, err: err}
}

// prepended is a field and a body that is an io.WriterTo only.
type prepended struct {
	field []byte
	body  io.WriterTo
	err   error // of the field
}

func (p *prepended) WriteTo(w io.Writer) (int64, error) {
	if p.err != nil {
		return 0, p.err
	}
	f := &fieldWriter{w: w, field: p.field}
	_, err := p.body.WriteTo(f)
	if f.err != nil {
		err = f.err // whatever the body made of it
	}
	return f.n, err
}

// fieldWriter writes a field before the first octet that is written to it. Its first error is its last.
type fieldWriter struct {
	w     io.Writer
	field []byte // nil once it is written
	n     int64
	err   error
}

func (f *fieldWriter) Write(b []byte) (int, error) {
	if f.err != nil || len(b) == 0 {
		return 0, f.err
	}
	if f.field != nil {
		if f.err = checkStart(b[0]); f.err != nil {
			return 0, f.err
		}
		if f.write(f.field); f.err != nil {
			return 0, f.err
		}
		f.field = nil
	}
	return f.write(b), f.err
}

func (f *fieldWriter) write(b []byte) (n int) {
	n, f.err = f.w.Write(b)
	if f.err == nil && n < len(b) {
		f.err = io.ErrShortWrite
	}
	f.n += int64(n)
	return n
}

// readOnce is a field and a body that can be read once only.
type readOnce struct {
	field []byte
	body  io.Reader
	all   io.Reader // field and body, once the body is known to have an octet
	err   error     // of the field or of the body's beginning
}

func (o *readOnce) Read(p []byte) (int, error) {
	if o.all == nil && o.err == nil {
		var first [1]byte
		if _, o.err = io.ReadFull(o.body, first[:]); o.err == nil {
			o.err = checkStart(first[0])
		}
		o.all = io.MultiReader(bytes.NewReader(o.field), bytes.NewReader(first[:]), o.body)
	}
	if o.err != nil {
		return 0, o.err
	}
	return o.all.Read(p)
}

func (o *readOnce) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{o}) // without its WriteTo
}

// checkStart refuses a message whose first octet would make its first line part of the field (RFC 5322, 2.2.3).
func checkStart(c byte) error {
	if c == ' ' || c == '\t' {
		return errContinued
	}
	return nil
}
