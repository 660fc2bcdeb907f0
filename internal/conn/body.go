package conn

import (
	"context"
	"io"

	"github.com/smtprelay/smtprelay/internal/body"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// Message is what one transaction sends.
type Message struct {
	From   string
	Mail   wire.MailParams
	To     []string
	Rcpts  []int                             // which of To
	Params func(addr string) wire.RcptParams // of a recipient's RCPT; nil: none have any

	AllOrNothing bool // nothing is sent unless the relay accepts all recipients

	Body io.WriterTo // as body.Again returned it
	Size int64       // of the body in its canonical form; 0: not known

	// BeforeEnd, if not nil, is called once the body is written and before the end of the message may leave. After an error the end
	// does not leave.
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

// OneShot reports whether b is used up by writing.
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

// headAhead is how much of a body that can be written once only is read before it is written: more than a chunk, so that
// the relay is asked before the rest is used up.
const headAhead = maxChunk + 2

// headedBody is a body that can be written once only, of which the beginning was read ahead. It can be written again as long
// as nothing beyond that is used.
type headedBody struct {
	head []byte
	rest io.Reader
	used bool // rest was asked for more
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
