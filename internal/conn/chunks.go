package conn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/smtprelay/smtprelay/internal/body"
	"github.com/smtprelay/smtprelay/internal/moving"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// A body in chunks (RFC 3030) is sent before the relay has replied to its envelope. These rules keep the outcome exact:
//
//   - LAST stands on an empty chunk after the body, in the same write. Some relays accept a last chunk that was cut short by the end
//     of the connection. With an empty last chunk, a truncated body is never a complete message.
//   - Bodies are sent in chunks only to an address that discards the octets of a chunk that it refuses. Other relays read these
//     octets as commands, so that the author of a body could inject a message. Each address is probed once: see showDiscard.
//   - The first chunk to an address waits for the replies to its envelope. If the relay sends an extra reply, a command could seem
//     accepted that the relay has not answered yet.
//   - The first chunk of a connection that would follow a message without final reply waits for the replies to its envelope. Some
//     relays discard what arrives together with the end of a message, and never reply to it.
//   - A connection takes no further message after an incomplete body of which the relay has accepted a chunk. go-smtp may give the
//     next message the reply to the incomplete one, and so refuse a message that it has delivered.
//
// The first two rules hold whatever the relay does. The others rely on the relay behaving as it did before.

// maxChunk is the size of the largest chunk, and of the buffer for a body of unknown size.
const maxChunk = 64 << 10

var chunkPool = sync.Pool{New: func() any { return new([maxChunk]byte) }}

// errRefused stops the writing of a body that the relay has refused.
var errRefused = errors.New("refused by the relay")

// chunkedBody is a transaction's body on its way in chunks.
//
// MAIL declares the size of the message, so the size must be known first. The size of [body.Bytes] is known. Any other body is
// written to a buffer before the envelope. A body that outgrows the buffer is sent in several chunks. Only whole chunks are
// written, so that the connection stays in step if the body fails. If the relay has not announced a maximum size, such a body is
// sent with DATA: a relay that stops reading within a chunk that exceeds its own limit would take the rest for commands (seen in
// Exim).
type chunkedBody struct {
	buffer *[maxChunk]byte // nil for Bytes
	used   int             // octets in buffer
	begun  bool            // the envelope is written
	dots   wire.BodyWriter // used by goByData
	left   int64           // for Bytes: octets not yet assigned to a chunk
	room   int             // octets missing from the current chunk
}

// mustHoldLocked reports whether the body must not leave before the relay has answered its envelope.
func (t *Transaction) mustHoldLocked() bool {
	c := t.c
	switch {
	case c.pendingAuth != nil: // a relay that refuses AUTH may still accept mail, as from an unauthenticated client
	case t.clearing: // if RSET is refused, the message would go to the recipients of the open envelope
	case t.waitsForRcpts():
	case !c.inStep:
	case t.result.Overlapped && !c.overlapped:
	default:
		return false
	}
	return true
}

// waitsForRcpts reports whether the body is held back until each recipient has its reply.
func (t *Transaction) waitsForRcpts() bool { return t.m.AllOrNothing && len(t.result.Rcpt) > 1 }

// goesInChunks reports whether to send the body in chunks, as far as that is known before Body.WriteTo is called.
func (t *Transaction) goesInChunks() bool {
	switch b := t.m.Body.(type) {
	case body.Bytes:
		return t.c.chunked && !beginsOddly(b)
	case *headedBody:
		return t.c.chunked && !beginsOddly(b.head)
	}
	return t.c.chunked
}

// beginsOddly reports whether a body begins with a line that is not a header field. With DATA, Postfix removes a mailbox "From "
// line and keeps the header after it. With chunks, Postfix takes the whole header for the body of the message.
func beginsOddly(body []byte) bool {
	return bytes.HasPrefix(body, []byte("From ")) || bytes.HasPrefix(body, []byte(">From ")) ||
		len(body) > 0 && (body[0] == ' ' || body[0] == '\t')
}

// remaining returns how many octets of the body part has to write, without commands.
func (t *Transaction) remaining() int64 {
	switch {
	case !t.result.Chunked, t.bodyOver:
		return 0
	case isBytes(t.m.Body):
		return t.m.Size
	}
	return int64(t.chunks.used)
}

// converseInChunks writes the envelope, and the body except for the octets that part will write. It reports whether to call part.
func (t *Transaction) converseInChunks() bool {
	if isBytes(t.m.Body) {
		return t.beginChunks(t.m.Size)
	}
	b := &t.chunks
	b.buffer = chunkPool.Get().(*[maxChunk]byte)
	t.c.body.Reset((*chunkSink)(t), false)
	err := t.writeBody()
	if err == nil && !b.begun && beginsOddly(b.buffer[:b.used]) {
		err = t.goByData()
	}
	switch {
	case err == errRefused:
		return false
	case err != nil && !t.result.Chunked:
		t.giveUp(err)
		return false
	case err != nil:
		t.result.BodyErr = err // only whole chunks were written, so the connection is in step
		if b.begun {
			t.c.Retire(Full)
		}
		return false
	case b.begun:
		return true
	}
	return t.beginChunks(int64(b.used))
}

// readAhead replaces a one-shot body: a small body by its octets, a larger one by a [headedBody].
func (t *Transaction) readAhead() error {
	r := t.m.Body.(io.Reader)
	var head bytes.Buffer
	switch n, err := io.CopyN(&head, readerUntil{t.ctx, moving.Reader(r)}, headAhead); {
	case err == nil:
		t.m.Body = &headedBody{head: head.Bytes(), rest: r}
		return nil
	case err != io.EOF:
		return err
	case n == 0:
		return ErrEmptyBody
	}
	t.m.Body, t.m.Size = body.Bytes(head.Bytes()), wire.CanonicalSize(head.Bytes())
	if limit := t.c.ext.Size; limit > 0 && t.m.Size > limit {
		return &SizeError{Limit: limit}
	}
	t.declare(t.m.Size)
	return nil
}

// declare sets the SIZE parameter of MAIL, if the relay offers SIZE.
func (t *Transaction) declare(size int64) {
	if t.c.ext.Has("SIZE") {
		t.mail.Size = size
	}
}

// beginChunks writes the envelope for a message of size octets, 0 if unknown, and reports whether to send the body.
func (t *Transaction) beginChunks(size int64) bool {
	if size > 0 {
		t.declare(size)
	}
	t.chunks.begun = true
	if !t.envelope() {
		return false
	}
	if !t.held {
		return true
	}
	together := t.result.Overlapped && t.holdsPrevDot // the envelope leaves in one write with the previous message's end
	if !t.send() || !t.awaitEnvelope() || !t.dataIsDue() {
		return false
	}
	c := t.c
	if !c.inStep {
		c.inStep = true
		c.o.Profile.NoteDiscard(c.addr, true)
	}
	if together {
		c.mu.Lock()
		c.overlapped = true
		c.mu.Unlock()
	}
	return true
}

// chunkSink receives the canonical form of a body of unknown size.
type chunkSink Transaction

// Write implements io.Writer.
func (cs *chunkSink) Write(p []byte) (int, error) {
	t := (*Transaction)(cs)
	b := &t.chunks
	n := 0
	for {
		if !t.result.Chunked {
			k, err := b.dots.Write(p[n:])
			return n + k, err
		}
		k := copy(b.buffer[b.used:], p[n:])
		b.used += k
		if n += k; n == len(p) {
			return n, nil
		}
		if err := t.overflow(); err != nil {
			return n, err
		}
	}
}

// overflow empties the full buffer: it writes a chunk, or switches to DATA.
func (t *Transaction) overflow() error {
	b := &t.chunks
	if !b.begun && (t.c.ext.Size == 0 || beginsOddly(b.buffer[:b.used])) {
		return t.goByData()
	}
	if !b.begun && !t.beginChunks(0) || !t.writeChunk() || !t.sendNow() {
		return errRefused
	}
	if h, ok := t.m.Body.(*headedBody); ok && !h.used && (!t.awaitEnvelope() || t.unwanted()) {
		return errRefused // the rest was not read, so the body can be written again
	}
	return nil
}

// goByData switches to DATA in the middle of the body, before anything was sent, and writes the buffer.
func (t *Transaction) goByData() error {
	b := &t.chunks
	b.begun, t.result.Chunked = true, false
	if !t.beginData() {
		return errRefused
	}
	b.dots.Reset(t.c.out, true)
	_, err := b.dots.Write(b.buffer[:b.used])
	return err
}

// unwanted reports whether the relay has already refused the message, so that no further chunk may be sent (RFC 3030, 2).
func (t *Transaction) unwanted() bool {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	step, _ := t.result.Refusal(t.m.AllOrNothing)
	return step != ""
}

// startChunk writes the command for a chunk of n octets, unless the relay has refused the message.
func (t *Transaction) startChunk(n int) bool {
	if t.unwanted() {
		return false
	}
	c := t.c
	c.line = append(strconv.AppendInt(append(c.line[:0], "BDAT "...), int64(n), 10), "\r\n"...)
	end := c.position() + int64(len(c.line)+n)
	if !c.expect(exchange{op: StepBdat, tx: t, limit: c.o.Timeouts.Command, end: end}) {
		return false
	}
	if c.trace.Command != nil {
		c.trace.Command(t.ctx, fmt.Sprintf("BDAT %d", n))
	}
	_, err := c.out.Write(c.line)
	return err == nil || t.explained()
}

// writeChunk writes the buffer as a chunk.
func (t *Transaction) writeChunk() bool {
	b := &t.chunks
	if b.used == 0 {
		return true
	}
	if !t.startChunk(b.used) {
		return false
	}
	_, err := t.c.out.Write(b.buffer[:b.used])
	b.used = 0
	return err == nil || t.explained()
}

// lastChunks writes the rest of the body.
func (t *Transaction) lastChunks() bool {
	if t.chunks.buffer != nil {
		return t.writeChunk()
	}
	t.chunks.left = t.m.Size
	t.c.body.Reset((*chunkSplitter)(t), false)
	switch err := t.writeBody(); {
	case err == errRefused:
		return false
	case err != nil:
		t.giveUp(err)
		return false
	}
	return true
}

// finishChunks writes the empty chunk that ends the body.
func (t *Transaction) finishChunks() bool {
	return !t.unwanted() && t.finish(StepBdat, "BDAT 0 LAST")
}

// chunkSplitter splits the canonical form of a body of known size into chunks.
type chunkSplitter Transaction

// Write implements io.Writer.
func (cs *chunkSplitter) Write(p []byte) (int, error) {
	t := (*Transaction)(cs)
	b := &t.chunks
	n := 0
	for n < len(p) {
		if b.room == 0 {
			b.room = int(min(b.left, maxChunk))
			b.left -= int64(b.room)
			if !t.startChunk(b.room) {
				return n, errRefused
			}
		}
		k, err := t.c.out.Write(p[n:min(n+b.room, len(p))])
		n += k
		b.room -= k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
