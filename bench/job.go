// One run of one peer: its input, its result, and the loop that all peers share.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// job is the input of a peer's process, in JSON as its only argument.
type job struct {
	Peer     string  `json:"peer"`
	Host     string  `json:"host"`
	Port     int     `json:"port"`
	WarmPort int     `json:"warm_port"` // a listener without delay, for the warm-up; 0 means none
	TLS      tlsMode `json:"tls"`
	Senders  int     `json:"senders"`  // goroutines, or what the language has instead, that each send and wait
	Size     int     `json:"size"`     // octets of a message, before dot-stuffing
	Stream   bool    `json:"stream"`   // write the body by a function or from a stream, if the peer can
	Conns    int     `json:"conns"`    // connections that the relay allows
	Rotate   int     `json:"rotate"`   // messages that the relay allows on each
	InFlight int     `json:"inflight"` // with CHUNKING
	Resume   bool    `json:"resume"`   // keep TLS sessions
	Messages int     `json:"messages"` // how many to send; 0 means as many as Millis allow
	Millis   int     `json:"millis"`
	Cold     bool    `json:"cold"`              // no warm-up
	Waiters  int     `json:"waiters,omitempty"` // only measure the memory of this many waiting Sends

	dial func() (net.Conn, error) // nil means over TCP; for peers that dial themselves
}

// connect opens a connection to the relay.
func (j job) connect() (net.Conn, error) {
	if j.dial != nil {
		return j.dial()
	}
	return net.Dial("tcp", j.addr())
}

func (j job) addr() string { return fmt.Sprintf("%s:%d", j.Host, j.Port) }

// result is the output of a peer's process, in JSON on its standard output.
type result struct {
	Sent    int      `json:"sent"`
	Failed  int      `json:"failed"`
	Errors  []string `json:"errors,omitempty"` // a few of them
	WallNs  int64    `json:"wall_ns"`          // until the last receipt
	CPUNs   int64    `json:"cpu_ns"`           // until all connections are closed
	Mallocs int64    `json:"mallocs"`          // -1 if the language does not count them
	Octets  int64    `json:"octets"`           // allocated; -1 as above
	IdleRSS int64    `json:"idle_rss"`         // before the first message
	PeakRSS int64    `json:"peak_rss"`
}

// source hands out the numbers of the messages still to send.
type source struct {
	last  int64 // 0 means endless
	until time.Time
	taken atomic.Int64
}

func newSource(messages int, millis int) *source {
	s := &source{last: int64(messages)}
	if messages == 0 {
		s.until = time.Now().Add(time.Duration(millis) * time.Millisecond)
	}
	return s
}

// next returns the next number, 1-based, or 0 if no more are to be sent.
func (s *source) next() int64 {
	if s.last == 0 && !time.Now().Before(s.until) {
		return 0
	}
	n := s.taken.Add(1)
	if s.last > 0 && n > s.last {
		return 0
	}
	return n
}

// tally counts the outcomes of messages.
type tally struct {
	sent atomic.Int64
	last atomic.Int64 // when the last one was counted, in ns since the start
	from time.Time

	mu     sync.Mutex // guards the fields below
	failed int
	errors []string
}

// done counts one message. It is safe for concurrent use.
func (t *tally) done(err error) {
	t.last.Store(int64(time.Since(t.from)))
	if err == nil {
		t.sent.Add(1)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed++
	if len(t.errors) < 3 {
		t.errors = append(t.errors, err.Error())
	}
}

// A peer is one way of sending.
type peer struct {
	name string
	what string // how it is driven
	kind kind
	each bool // a new connection for each message
	deep bool // with CHUNKING, many messages in flight

	// run sends what src hands out and reports each outcome to t. It returns when all connections are closed. It is nil for
	// nodemailer, whose process is nodemailer/peer.mjs.
	run func(j job, src *source, t *tally) error
}

// kind is a peer's role in the tables.
type kind int

const (
	other kind = iota // another client
	ours
	limit  // octets only: the best that the protocol allows
	byHand // octets only too, but with the waits that other clients have
)

// peerMain is a peer's process.
func peerMain(arg string, out io.Writer) error {
	var j job
	if err := json.Unmarshal([]byte(arg), &j); err != nil {
		return err
	}
	if j.Waiters > 0 {
		return waitersMain(j, out)
	}
	p := peerNamed(j.Peer)
	if p == nil {
		return fmt.Errorf("no peer %q", j.Peer)
	}
	if j.WarmPort > 0 {
		warm := j
		warm.Port, warm.Messages, warm.Size = j.WarmPort, warmMessages, min(j.Size, 10<<10)
		if err := p.run(warm, newSource(warm.Messages, 0), &tally{from: time.Now()}); err != nil {
			return fmt.Errorf("warming up: %w", err)
		}
	}
	idle := settle()
	before := used()
	t := &tally{from: time.Now()}
	if err := p.run(j, newSource(j.Messages, j.Millis), t); err != nil {
		return err
	}
	after := used()
	return json.NewEncoder(out).Encode(result{
		Sent:    int(t.sent.Load()),
		Failed:  t.failed,
		Errors:  t.errors,
		WallNs:  t.last.Load(),
		CPUNs:   int64(after.cpu - before.cpu),
		Mallocs: int64(after.mallocs - before.mallocs),
		Octets:  int64(after.octets - before.octets),
		IdleRSS: idle,
		PeakRSS: peak(),
	})
}

// warmMessages is how many messages are sent before the measured ones: enough to load code, verify the certificate once and, in
// JavaScript, compile the inner loops.
const warmMessages = 300

// eachSender runs j.Senders goroutines. Each calls start for a function that sends the message with the given number, and calls
// that function while there are messages.
func eachSender(j job, src *source, t *tally, start func() func(n int64) error) {
	var all sync.WaitGroup
	for range j.Senders {
		all.Go(func() {
			send := start()
			for n := src.next(); n > 0; n = src.next() {
				t.done(send(n))
			}
		})
	}
	all.Wait()
}

const (
	sender    = "bounces@client.example"
	recipient = "recipient@destination.example"
	hello     = "client.example"
)

// header is the header of a message, with 0 for its number.
const header = "From: Bench <" + sender + ">\r\n" +
	"To: <" + recipient + ">\r\n" +
	"Subject: a message of a certain size\r\n" +
	"Date: Tue, 24 Nov 2026 12:00:00 +0000\r\n" +
	"Message-ID: <0000000000000000@client.example>\r\n" +
	"MIME-Version: 1.0\r\n" +
	"Content-Type: text/plain; charset=us-ascii\r\n" +
	"\r\n"

var numberAt = strings.Index(header, "<000") + 1

// messageID returns the identifier of the message n, without angle brackets.
func messageID(n int64) string { return fmt.Sprintf("%016d@client.example", n) }

// stamp writes n into a message that begins with header.
func stamp(message []byte, n int64) {
	for i := numberAt + 15; i >= numberAt; i-- {
		message[i] = byte('0' + n%10)
		n /= 10
	}
}

// textLine needs no encoding: short, ASCII, no leading dot, no equals sign.
const textLine = "Sphinx of black quartz, judge my vow, and pack my box with jugs.\r\n"

// text returns n octets of text, the last two being CRLF.
func text(n int) []byte {
	b := bytes.Repeat([]byte(textLine), n/len(textLine)+1)[:n]
	if n >= 2 {
		copy(b[n-2:], "\r\n")
	}
	return b
}

// newMessage returns a message of about this size, with capacity for a final dot and some commands after it.
func newMessage(size int) []byte {
	size = max(size, len(header)+2)
	b := make([]byte, 0, size+256)
	return append(append(b, header...), text(size-len(header))...)
}

// streamed is a message that is never in memory as a whole.
type streamed struct {
	head []byte
	left int
}

// newStream returns message n of about this size.
func newStream(size int, n int64) *streamed {
	head := []byte(header)
	stamp(head, n)
	return &streamed{head: head, left: max(size-len(header), 2)}
}

var block = text(len(textLine) * 500)

// WriteTo writes the whole message; it can be called again.
func (s *streamed) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(s.head)
	total := int64(n)
	for left := s.left; left > 0 && err == nil; left -= n {
		n, err = w.Write(lastLine(left))
		total += int64(n)
	}
	return total, err
}

// lastLine returns the next part of the text if this many octets are left.
func lastLine(left int) []byte {
	if left >= len(block)+2 {
		return block
	}
	return text(left)
}

// reader returns the message as a stream that can be read once.
func (s *streamed) reader() io.Reader {
	parts := []io.Reader{bytes.NewReader(s.head)}
	for left := s.left; left > 0; {
		b := lastLine(left)
		parts = append(parts, bytes.NewReader(b))
		left -= len(b)
	}
	return io.MultiReader(parts...)
}

// heldOctets returns the size of this process's heap and stacks after garbage collection.
func heldOctets() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}
