package smtprelay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// maxChunk is the size of the largest chunk (RFC 3030), and of the buffer for a body whose size is not known.
const maxChunk = 64 << 10

var chunkPool = sync.Pool{New: func() any { return new([maxChunk]byte) }}

// errRefused ends the writing of a body that the relay does not want.
var errRefused = errors.New("refused by the relay")

// chunkedBody is a transaction's body on its way in chunks.
//
// MAIL declares the size of the message, so the size comes first: that of [Bytes] is known, and another body is made in a
// buffer before anything is written. One that outgrows the buffer goes in several chunks, of which only whole ones are
// written, so that the session stays in step if it fails. If the relay has not said how large a message may be, such a body
// goes by DATA: a relay that stops reading within a chunk which is over a limit of its own would take the rest of it for
// commands (seen in Exim).
type chunkedBody struct {
	buffer *[maxChunk]byte // nil for Bytes
	used   int             // octets in it
	begun  bool            // the envelope is written
	byData bool            // the body goes by DATA
	dots   wire.BodyWriter // on the way there
	left   int64           // of Bytes: octets still to be written
	room   int             // of the chunk that is being written
}

// waitsForRcpts reports whether the body is held back until each recipient has its reply.
func (t *transaction) waitsForRcpts() bool { return t.m.AllOrNothing && len(t.rcpts) > 1 }

func isBytes(b any) bool {
	_, ok := b.(bytesBody)
	return ok
}

// remaining is how much end has to write.
func (t *transaction) remaining() int64 {
	switch {
	case !t.s.chunks() || t.chunked.byData:
		return int64(len(".\r\n"))
	case isBytes(t.m.Body):
		return t.size
	}
	return int64(t.chunked.used)
}

// converseInChunks writes the envelope and the body, but for its last chunk, and reports whether that is due.
func (t *transaction) converseInChunks() bool {
	if oneShot(t.m.Body) {
		if t.bodyErr = t.readAhead(); t.bodyErr != nil {
			return false
		}
	}
	if isBytes(t.m.Body) {
		return t.beginChunks(t.size)
	}
	c := &t.chunked
	c.buffer = chunkPool.Get().(*[maxChunk]byte)
	t.s.body.Reset((*chunkSink)(t), false)
	switch err := t.writeBody(); {
	case err == errRefused:
		return false
	case err != nil && c.byData:
		t.giveUp(err)
		return false
	case err != nil:
		t.bodyErr = err // only whole chunks were written: RSET will do
		return false
	case c.begun:
		return true
	}
	return t.beginChunks(int64(c.used))
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
	k, err := (&readerBody{b.rest}).WriteTo(w)
	return int64(n) + k, err
}

// readAhead replaces a body that can be written once only: a small one by its octets, another one by a [headedBody].
func (t *transaction) readAhead() error {
	r := t.m.Body.(io.Reader)
	var head bytes.Buffer
	switch n, err := io.CopyN(&head, readerUntil{t.ctx, r}, headAhead); {
	case err == nil:
		t.m.Body = &headedBody{head: head.Bytes(), rest: r}
		return nil
	case err != io.EOF:
		return err
	case n == 0:
		return errEmptyBody
	}
	t.m.Body, t.size = bytesBody(head.Bytes()), wire.CanonicalSize(head.Bytes())
	if limit := t.s.ext.Size; limit > 0 && t.size > limit {
		return &sizeError{limit}
	}
	return nil
}

// readerUntil reads until the context ends.
type readerUntil struct {
	ctx context.Context
	r   io.Reader
}

func (u readerUntil) Read(p []byte) (int, error) {
	if err := ended(u.ctx); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

// beginChunks writes the envelope for a message of size octets, 0 if that is not known, and reports whether the body is to
// follow.
func (t *transaction) beginChunks(size int64) bool {
	if t.s.ext.Has("SIZE") && size > 0 {
		t.mail.Size = size
	}
	t.chunked.begun = true
	led := t.s.lead != nil
	if !t.envelope() {
		return false
	}
	// Behind an AUTH that is refused a relay may take mail all the same, as from anybody; and behind a RSET that is refused the
	// message would go to the recipients of the envelope that is still open. With DATA there would be no body.
	if !led && !t.clearing && !t.waitsForRcpts() {
		return true
	}
	return t.sendNow() && t.awaitEnvelope() && t.dataIsDue()
}

// chunkSink takes the canonical form of a body whose size is not known.
type chunkSink transaction

// Write implements io.Writer.
func (cs *chunkSink) Write(p []byte) (int, error) {
	t := (*transaction)(cs)
	c := &t.chunked
	n := 0
	for {
		if c.byData {
			k, err := c.dots.Write(p[n:])
			return n + k, err
		}
		k := copy(c.buffer[c.used:], p[n:])
		c.used += k
		if n += k; n == len(p) {
			return n, nil
		}
		if err := t.overflow(); err != nil {
			return n, err
		}
	}
}

// overflow makes room in the buffer: it writes a chunk, or goes over to DATA.
func (t *transaction) overflow() error {
	c := &t.chunked
	if !c.begun && t.s.ext.Size == 0 {
		return t.goByData()
	}
	if !c.begun && !t.beginChunks(0) || t.unwanted() || !t.startChunk(c.used, false) {
		return errRefused
	}
	if _, err := t.s.out.Write(c.buffer[:c.used]); err != nil || t.s.flush() != nil {
		t.explained()
		return errRefused
	}
	c.used = 0
	if h, ok := t.m.Body.(*headedBody); ok && !h.used && (!t.awaitEnvelope() || t.unwanted()) {
		return errRefused // and it can be written again
	}
	return nil
}

// goByData begins an ordinary transaction in the middle of the body, and writes what is in the buffer.
func (t *transaction) goByData() error {
	c := &t.chunked
	c.begun, c.byData = true, true
	if !t.envelope() || !t.askData() || !t.sendNow() || !t.awaitEnvelope() || !t.startData() {
		return errRefused
	}
	c.dots.Reset(t.s.out, true)
	_, err := c.dots.Write(c.buffer[:c.used])
	return err
}

// unwanted reports whether the relay has refused the message already, so that no further chunk is to be sent
// (RFC 3030, 2).
func (t *transaction) unwanted() bool {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	return t.refusalLocked() != nil
}

// startChunk writes the command for a chunk of n octets.
func (t *transaction) startChunk(n int, last bool) bool {
	s := t.s
	x := exchange{op: OpBdat, tx: t, limit: s.cfg.Timeouts.Command}
	s.line = append(strconv.AppendInt(append(s.line[:0], "BDAT "...), int64(n), 10), "\r\n"...)
	if last {
		x.final, x.limit = true, s.cfg.Timeouts.FinalReply
		s.line = append(s.line[:len(s.line)-2], " LAST\r\n"...)
	}
	x.end = s.position() + int64(len(s.line)+n)
	if last {
		t.endAt = x.end // ahead of time, since a full buffer may leave while the chunk is put into it
	}
	if !s.expect(x) {
		t.endAt = 0
		return false
	}
	s.mu.Lock()
	s.chunkEnd = x.end
	s.mu.Unlock()
	if tr := s.cfg.Trace; tr != nil && tr.Command != nil {
		tr.Command(t.ctx, s.id, fmt.Sprintf("BDAT %d%s", n, map[bool]string{true: " LAST"}[last]))
	}
	_, err := s.out.Write(s.line)
	return err == nil || t.explained()
}

// lastChunks writes what is left of the body, up to its last chunk.
func (t *transaction) lastChunks() bool {
	c, s := &t.chunked, t.s
	if c.buffer != nil {
		if t.unwanted() || !t.startChunk(c.used, true) {
			return false
		}
		s.out.Write(c.buffer[:c.used])
		return true
	}
	c.left = t.size
	s.body.Reset((*chunkSplitter)(t), false)
	switch err := t.writeBody(); {
	case err == errRefused:
		return t.endAt > 0
	case err != nil && t.endAt == 0:
		t.giveUp(err)
		return false
	}
	return true // if a write has failed, the session knows
}

// chunkSplitter divides the canonical form of a body whose size is known into chunks.
type chunkSplitter transaction

// Write implements io.Writer.
func (cs *chunkSplitter) Write(p []byte) (int, error) {
	t := (*transaction)(cs)
	c := &t.chunked
	n := 0
	for n < len(p) {
		if c.room == 0 {
			c.room = int(min(c.left, maxChunk))
			if t.unwanted() || !t.startChunk(c.room, int64(c.room) == c.left) {
				return n, errRefused
			}
			c.left -= int64(c.room)
		}
		k, err := t.s.out.Write(p[n:min(n+c.room, len(p))])
		n += k
		c.room -= k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
