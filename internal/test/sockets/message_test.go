package sockets

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Messages: how one is drawn, what its body is, how the client gets the body, and how a body that has arrived is recognised. An
// address names its message, so that an envelope shows which body belongs to it.

// message is what one caller sends.
type message struct {
	id       int
	to       []string
	raw      string // the body, instead of a generated one
	size     int    // of the generated body, in octets
	kind     bodyKind
	failAt   int           // the body fails after this many octets; 0 means never
	cancelAt int           // the context ends when this many octets of the body are written; 0 means never
	deadline time.Duration // of the first Send; negative means none
	all      bool          // AllOrNothing
	again    int           // how many times the caller sends it again after "not accepted"
	pieces   uint64        // seed of the sizes of writes
}

type bodyKind int

const (
	asBytes  bodyKind = iota // smtprelay.Bytes
	asReader                 // smtprelay.Reader
	asWriter                 // an io.WriterTo of unknown size
	bodyKinds
)

func sender(id int) string { return fmt.Sprintf("s.m%d@storm.example", id) }

// recipient makes an address; the word says what the relay does with it: "ok" is accepted, "gone" refused, "later" refused
// temporarily.
func recipient(word string, n, id int) string {
	return fmt.Sprintf("%s%d.m%d@storm.example", word, n, id)
}

func isRefused(to string) bool {
	return strings.HasPrefix(to, "gone") || strings.HasPrefix(to, "later")
}

// refusal is a relay's reply to RCPT for an address that isRefused.
func refusal(to string) string {
	if strings.HasPrefix(to, "gone") {
		return "550 5.1.1 no such user"
	}
	return "450 4.2.1 try again later"
}

// idOf returns the message that an address names, or 0.
func idOf(addr string) int {
	_, rest, _ := strings.Cut(addr, ".m")
	digits, domain, _ := strings.Cut(rest, "@")
	id, err := strconv.Atoi(digits)
	if err != nil || domain != "storm.example" {
		return 0
	}
	return id
}

// filler is the content of bodies: blocks of 64 octets, each a line or two. Some lines are commands or begin with a dot.
var filler = func() []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	commands := []string{"MAIL FROM:<smuggler@evil.example>", "RCPT TO:<victim@evil.example>", "DATA", "RSET", "QUIT", ".", "..", ".x", "BDAT 5 LAST"}
	var b []byte
	letters := make([]byte, 64<<10)
	for i := range letters {
		letters[i] = 'a' + byte(rng.IntN(26))
	}
	for len(b) < 5<<20 {
		most := 62
		if rng.IntN(8) == 0 {
			command := commands[rng.IntN(len(commands))]
			b = append(b, command+"\r\n"...)
			most -= len(command) + 2
		}
		from := rng.IntN(len(letters) - most)
		b = append(append(b, letters[from:from+most]...), "\r\n"...)
	}
	return b
}()

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const (
	head     = "Subject: message %010d\r\nX-Pad: %s\r\n\r\n"
	tail     = "END %010d %010d %08x\r\n" // the message, the octets before this line, their checksum
	headSize = 9 + 8 + 10 + 2 + 7 + 2 + 2
	tailSize = 4 + 10 + 1 + 10 + 1 + 8 + 2
	tinySize = headSize + tailSize // a smaller body is only the digits of its message's number
)

// appendBody appends the body of m to b.
func (m *message) appendBody(b []byte) []byte {
	begin := len(b)
	if m.raw != "" {
		return append(b, m.raw...)
	}
	if m.size < tinySize {
		digits := strconv.Itoa(m.id)
		for len(b)-begin < m.size {
			b = append(b, digits[(len(b)-begin)%len(digits)])
		}
		return b
	}
	lines, pad := (m.size-tinySize)/64, (m.size-tinySize)%64
	b = fmt.Appendf(b, head, m.id, strings.Repeat("p", pad))
	from := m.id * 7919 % (len(filler)/64 - lines) * 64
	b = append(b, filler[from:from+64*lines]...)
	return fmt.Appendf(b, tail, m.id, len(b)-begin, crc32.Checksum(b[begin:], castagnoli))
}

// inspect says what is wrong with a body that has arrived for m; "" means that it is complete.
func (m *message) inspect(body []byte) (fault, detail string) {
	if m.raw != "" || m.size < tinySize {
		if want := m.appendBody(nil); !bytes.Equal(body, want) && !bytes.Equal(body, append(want, "\r\n"...)) {
			return damaged(body, want), fmt.Sprintf("%.100q, want %q", body, want)
		}
		return "", ""
	}
	from := len(body) - tailSize
	var id, size int
	var sum uint32
	if from >= 0 {
		if _, err := fmt.Sscanf(string(body[from:]), tail, &id, &size, &sum); err == nil &&
			id == m.id && size == from && sum == crc32.Checksum(body[:from], castagnoli) {
			return "", ""
		}
	}
	detail = fmt.Sprintf("%d octets of %d", len(body), m.size)
	if id != 0 && id != m.id {
		detail += fmt.Sprintf(", ends as message %d", id)
	}
	return damaged(body, m.appendBody(nil)), detail
}

// damaged names the fault of a wrong body.
func damaged(body, want []byte) string {
	if len(body) < len(want) && bytes.HasPrefix(want, bytes.TrimSuffix(body, []byte("\r\n"))) {
		return "truncated"
	}
	return "mixed"
}

var errBody = errors.New("the body cannot be made")

// body returns the Body for the client. The octets of b must not change until Send has returned.
func (m *message) body(b []byte, cancel context.CancelFunc) io.WriterTo {
	p := &pieces{m: m, rest: b, cancel: cancel, rng: rand.New(rand.NewPCG(m.pieces, 0))}
	switch m.kind {
	case asBytes:
		return smtprelay.Bytes(b)
	case asReader:
		return smtprelay.Reader(struct{ io.Reader }{p})
	}
	return &writer{m, b, cancel}
}

// writer is a body that can be written again, from its beginning.
type writer struct {
	m      *message
	b      []byte
	cancel context.CancelFunc
}

func (w *writer) WriteTo(to io.Writer) (int64, error) {
	p := &pieces{m: w.m, rest: w.b, cancel: w.cancel, rng: rand.New(rand.NewPCG(w.m.pieces, 0))}
	return io.CopyBuffer(struct{ io.Writer }{to}, p, make([]byte, 16<<10))
}

// pieces writes a body in odd pieces, and fails or cancels the context on the way as its message says.
type pieces struct {
	m      *message
	rest   []byte
	cancel context.CancelFunc
	rng    *rand.Rand
	passed int
}

func (p *pieces) Read(b []byte) (int, error) {
	if p.m.failAt > 0 && p.passed >= p.m.failAt {
		return 0, errBody
	}
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	n := min(len(p.rest), len(b), 1+p.rng.IntN(16<<10))
	if p.m.failAt > 0 {
		n = min(n, p.m.failAt-p.passed)
	}
	if at := p.m.cancelAt; at > p.passed {
		if n = min(n, at-p.passed); p.passed+n == at {
			p.cancel()
		}
	}
	copy(b, p.rest[:n])
	p.rest = p.rest[n:]
	p.passed += n
	return n, nil
}
