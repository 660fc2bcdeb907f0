package conn

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"github.com/smtprelay/smtprelay/internal/body"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// Message is what one transaction sends.
type Message struct {
	From   string
	Mail   wire.MailParams
	To     []string
	Rcpts  []int                             // indexes into To: the recipients of this transaction
	Params func(addr string) wire.RcptParams // parameters of a recipient's RCPT; nil: none

	AllOrNothing bool // the body is sent only if the relay accepts all recipients

	Body io.WriterTo // as returned by body.Again
	Size int64       // size of the body in canonical form; 0: unknown

	// BeforeEnd, if not nil, is called after the body is written and before the end of the message is sent. After an error the
	// end is not sent.
	BeforeEnd func(ctx context.Context, to []string) error
}

// recipient returns the address of the ith recipient and the parameters of its RCPT.
func (m *Message) recipient(i int) (addr string, params wire.RcptParams) {
	addr = m.To[m.Rcpts[i]]
	if m.Params != nil {
		params = m.Params(addr)
	}
	return addr, params
}

// OneShot reports whether b can be written only once.
func OneShot(b io.WriterTo) bool {
	if h, ok := b.(*headedBody); ok {
		return h.used
	}
	return body.Once(b)
}

func isBytes(b any) bool {
	_, ok := b.(body.Bytes)
	return ok
}

// headAhead is how many octets of a one-shot body are read before the transaction begins. It exceeds a chunk, so that the relay can
// refuse the envelope before more of the body is consumed.
const headAhead = maxChunk + 2

// headedBody is a one-shot body whose beginning was read ahead. It can be written again until the rest is consumed.
type headedBody struct {
	head []byte
	rest io.Reader
	used bool // rest was read
}

// WriteTo implements io.WriterTo.
func (b *headedBody) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(b.head)
	if err != nil {
		return int64(n), err
	}
	b.used = true
	k, err := body.Reader(b.rest).WriteTo(w)
	return int64(n) + k, err
}

// readerUntil reads until the context ends.
type readerUntil struct {
	ctx context.Context
	r   io.Reader
}

func (u readerUntil) Read(p []byte) (int, error) {
	if err := ContextError(u.ctx); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

// writeBody writes the body through c.body, without the final dot.
func (t *Transaction) writeBody() error {
	c := t.c
	t.result.BodyBegun = true
	n, err := t.bodyTo(t.m.Body)
	if t.sinkErr != nil {
		err = t.sinkErr // takes precedence over WriteTo's error
	}
	if err == nil && n > c.body.Taken() {
		err = io.ErrShortWrite
	}
	if err == nil && c.body.Taken() == 0 {
		err = ErrEmptyBody
	}
	if err == nil {
		if err = c.body.Close(); err != nil {
			t.lostWriting = true
		}
	}
	return err
}

// bodyTo calls body.WriteTo.
func (t *Transaction) bodyTo(body io.WriterTo) (int64, error) {
	if isBytes(body) {
		return body.WriteTo(t)
	}
	w := &bodySink{c: t.c, t: t}
	n, err := body.WriteTo(w)
	w.end()
	return n, err
}

// bodySink is the io.Writer passed to Body.WriteTo. A Body may keep it and write after WriteTo has returned, from another
// goroutine, when the Transaction already serves another message. Such a write fails.
//
// Small writes are buffered, so that a body written octet by octet takes the lock once per buffer. The buffer is accessed
// without the lock, by the one goroutine that the Body writes from. The buffer is never reused, and mu guards the transaction.
// So a Body that writes from two goroutines at once can corrupt only its own message.
type bodySink struct {
	c    *Conn
	over atomic.Bool // WriteTo has returned; set under mu
	used int         // octets in buf
	buf  []byte      // nil until the second write: most bodies make one write
	any  bool        // the Body has written

	mu sync.Mutex   // held while t is written to
	t  *Transaction // nil once WriteTo has returned
}

var errBodyOver = errors.New("the body was written after its WriteTo had returned")

// Write implements io.Writer.
func (w *bodySink) Write(p []byte) (int, error) {
	used := w.used
	if len(p) > len(w.buf)-used || w.over.Load() || w.c.doomed.Load() {
		if w.any && w.buf == nil && len(p) < gather {
			w.buf = make([]byte, gather)
		}
		w.any = true
		return w.pass(p)
	}
	if len(p) == 1 {
		w.buf[used] = p[0]
	} else {
		copy(w.buf[used:], p)
	}
	w.used = used + len(p)
	return len(p), nil
}

// gather is the size of bodySink's buffer.
const gather = 512

// pass writes the buffer and p to the transaction.
func (w *bodySink) pass(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.t == nil {
		return 0, errBodyOver
	}
	if err := w.emptyLocked(); err != nil {
		return 0, err
	}
	return w.t.Write(p)
}

// emptyLocked writes the buffer to the transaction.
func (w *bodySink) emptyLocked() error {
	used := w.used
	w.used = 0
	if used == 0 {
		return nil
	}
	_, err := w.t.Write(w.buf[:used])
	return err
}

// end is called once WriteTo has returned. A failed write sets t.sinkErr.
func (w *bodySink) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over.Store(true)
	w.emptyLocked()
	w.t = nil
}

// Write writes a part of the body. After an error every later Write returns the same error.
func (t *Transaction) Write(p []byte) (n int, err error) {
	c := t.c
	switch {
	case t.sinkErr != nil:
		return 0, t.sinkErr
	case t.ctx.Err() != nil:
		t.sinkErr = ContextError(t.ctx)
		return 0, t.sinkErr
	}
	n, err = c.body.Write(p)
	if err != nil {
		t.lostWriting = true
	} else if c.ext.Size > 0 && c.body.Size() > c.ext.Size {
		err = &SizeError{Limit: c.ext.Size}
	}
	t.sinkErr = err
	return n, err
}
