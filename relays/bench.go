package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay"
)

// The modes that checks run in: how bodies are sent if the relay allows it.
const (
	byData   = "DATA"
	inChunks = "chunks" // Config.Chunking
)

// A bench is what a check works with: a relay, clients of it, and a record of what was sent and replied.
type bench struct {
	*running
	ctx   context.Context // ends when the check has taken too long
	certs *certificates
	check string
	mode  string // byData or inChunks
	proxy *proxy // set by throughProxy

	mu       sync.Mutex // guards the fields below
	sent     []*sending
	clients  []*smtprelay.Client
	dialogue dialogue
	refusals []string // replies of 4xx and 5xx, and failed dials
	closed   chan smtprelay.ConnClosedInfo
	offers   []string // the extensions of the last connection
}

// client returns a client that keeps within the relay's limits and uses plaintext, unless change says otherwise. It is closed at
// the end of the check.
func (b *bench) client(change ...func(*smtprelay.Config)) (*smtprelay.Client, error) {
	cfg := smtprelay.Config{
		Addr:      address(b.Plain),
		TLS:       smtprelay.TLSNone,
		LocalName: "client.example",
		Chunking:  b.mode == inChunks,
		Limits:    smtprelay.Limits{MaxConns: limits.MaxConns, MaxMessagesPerConn: limits.MaxMessages},
		Retry:     smtprelay.Retry{MinBackoff: 50 * time.Millisecond, MaxBackoff: time.Second},
		Timeouts: smtprelay.Timeouts{
			Dial: 10 * time.Second, Greeting: 20 * time.Second, TLS: 10 * time.Second, Command: 20 * time.Second,
			Data: 20 * time.Second, Write: 20 * time.Second, FinalReply: 20 * time.Second, Quit: 2 * time.Second,
		},
		Dial:  b.dial,
		Trace: b.trace(),
	}
	if b.proxy != nil {
		cfg.Addr = b.proxy.address()
	}
	for _, f := range change {
		f(&cfg)
	}
	c, err := smtprelay.New(cfg)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clients = append(b.clients, c)
	return c, nil
}

// throughProxy makes clients created later talk to the relay through a proxy.
func (b *bench) throughProxy(delay time.Duration) error {
	p, err := newProxy(address(b.Plain), delay)
	if err != nil {
		return err
	}
	b.proxy = p
	return nil
}

// Changes to a client's configuration.

func conns(n int) func(*smtprelay.Config) {
	return func(c *smtprelay.Config) { c.Limits.MaxConns = n }
}

func messages(n int) func(*smtprelay.Config) {
	return func(c *smtprelay.Config) { c.Limits.MaxMessagesPerConn = n }
}

func attempts(n int) func(*smtprelay.Config) {
	return func(c *smtprelay.Config) { c.Retry.MaxAttempts = n }
}

// startTLS is for the port with STARTTLS and AUTH PLAIN, implicitTLS for the one with AUTH LOGIN.
func (b *bench) startTLS(c *smtprelay.Config) { b.secure(c, b.StartTLS, smtprelay.TLSStartTLS) }

func (b *bench) implicitTLS(c *smtprelay.Config) { b.secure(c, b.Implicit, smtprelay.TLSImplicit) }

func (b *bench) secure(c *smtprelay.Config, port int, mode smtprelay.TLSMode) {
	c.Addr = net.JoinHostPort("localhost", strconv.Itoa(port))
	c.TLS = mode
	c.TLSConfig = &tls.Config{RootCAs: b.certs.roots}
	c.Username, c.Password = user, password
}

// mail makes a message with a unique body. It does not send it.
func (b *bench) mail(to ...string) *sending {
	if len(to) == 0 {
		to = []string{"ann"}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s := &sending{id: fmt.Sprintf("%s%d", b.prefix(), len(b.sent)+1), from: "shop@client.example"}
	for _, name := range to {
		s.to = append(s.to, name+"@relay.example")
	}
	s.setBody(fmt.Sprintf("This is %s.\r\n.A line that begins with a dot.\r\n.\r\nThe last line of %[1]s.\r\n", s.id))
	b.sent = append(b.sent, s)
	return s
}

// send sends a message and keeps the result, for the comparison with the ledger.
func (b *bench) send(c *smtprelay.Client, s *sending) error {
	return b.sendCtx(b.ctx, c, s)
}

func (b *bench) sendCtx(ctx context.Context, c *smtprelay.Client, s *sending) error {
	s.receipt, s.err = c.Send(ctx, s.message())
	s.done = true
	return s.err
}

// sendAll sends messages from several goroutines and returns the errors of those that not all recipients accepted.
func (b *bench) sendAll(c *smtprelay.Client, goroutines int, all []*sending) error {
	var wg sync.WaitGroup
	work := make(chan *sending)
	for range goroutines {
		wg.Go(func() { // ends when work is closed
			for s := range work {
				b.send(c, s)
			}
		})
	}
	for _, s := range all {
		work <- s
	}
	close(work)
	wg.Wait()
	var errs []error
	for _, s := range all {
		if s.err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.id, s.err))
		}
	}
	return first(errs)
}

func (b *bench) mails(n int) []*sending {
	all := make([]*sending, n)
	for i := range all {
		all[i] = b.mail()
	}
	return all
}

// offered reports whether the relay offered an extension on the last connection.
func (b *bench) offered(keyword string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.offers, func(s string) bool {
		word, _, _ := strings.Cut(s, " ")
		return strings.EqualFold(word, keyword)
	})
}

// refused returns the relay's refusals so far.
func (b *bench) refused() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.refusals)
}

func (b *bench) trace() *smtprelay.Trace {
	return &smtprelay.Trace{
		DialDone: func(_ context.Context, d smtprelay.DialDoneInfo) {
			b.mu.Lock()
			defer b.mu.Unlock()
			if d.Err != nil {
				b.refusals = append(b.refusals, d.Err.Error())
				return
			}
			b.offers = d.Extensions
		},
		Reply: func(_ context.Context, r smtprelay.ReplyInfo) {
			if r.Reply.Code < 400 {
				return
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			b.refusals = append(b.refusals, fmt.Sprintf("connection %d: %s: %d %s", r.Conn, r.Op.Text(), r.Reply.Code, r.Reply.Message))
		},
		ConnClosed: func(_ context.Context, c smtprelay.ConnClosedInfo) {
			select {
			case b.closed <- c:
			default: // nothing waits for it
			}
		},
	}
}

// dial records the bytes of the connection.
func (b *bench) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &recordedConn{Conn: c, to: &b.dialogue, n: b.dialogue.connection()}, nil
}

// finish closes what the check has opened, and compares what the client reported with what the relay has queued.
func (b *bench) finish() error {
	b.mu.Lock()
	clients := b.clients
	b.mu.Unlock()
	var errs []error
	for _, c := range clients {
		if err := c.Close(); err != nil {
			errs = append(errs, fmt.Errorf("Close: %w", err))
		}
	}
	if err := noneLeft(); err != nil {
		errs = append(errs, err)
	}
	if b.proxy != nil {
		b.proxy.close()
	}
	for _, c := range clients {
		if n := c.Stats().OpenConns; n != 0 {
			errs = append(errs, fmt.Errorf("Stats.OpenConns is %d after Close", n))
		}
	}
	return errors.Join(append(errs, b.audit())...)
}

// audit reads the relay's ledger and compares.
func (b *bench) audit() error {
	entries, err := b.queued(b.root)
	if err != nil {
		return err
	}
	return audit(b.prefix(), b.sent, entries)
}

// prefix begins the ids of the check's messages.
func (b *bench) prefix() string { return b.name + "/" + b.mode + "/" + b.check + "/" }

// noneLeft reports goroutines of the library that are left. It waits a moment for those about to end.
func noneLeft() error {
	buf := make([]byte, 1<<20)
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		all := buf[:runtime.Stack(buf, true)]
		var left []string
		for g := range strings.SplitSeq(string(all), "\n\n") {
			if strings.Contains(g, "smtprelay/smtprelay.") && !strings.Contains(g, "main.noneLeft") {
				left = append(left, g)
			}
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d goroutines are left after Close, the first of them:\n%s", len(left), left[0])
		}
	}
}

// first keeps the first three of many errors.
func first(errs []error) error {
	if len(errs) > 3 {
		errs = append(errs[:3:3], fmt.Errorf("and %d more", len(errs)-3))
	}
	return errors.Join(errs...)
}

// dialogue is the dialogue of one check's connections.
type dialogue struct {
	mu    sync.Mutex // guards the fields below
	conns int
	ends  int
	lines []string
}

func (d *dialogue) connection() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns++
	return d.conns
}

func (d *dialogue) add(n int, who string, text []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(text) > 0 && !isText(text) {
		d.lines = append(d.lines, fmt.Sprintf("%s%d: %d bytes", who, n, len(text)))
		return
	}
	all := bytes.SplitAfter(text, []byte("\n"))
	for i, line := range all {
		const head, tail = 12, 6 // of a body: enough to see where it begins and ends
		if len(all) > head+tail+1 && i >= head && i < len(all)-tail {
			if i == head {
				d.lines = append(d.lines, fmt.Sprintf("%s%d: (%d more lines)", who, n, len(all)-head-tail))
			}
			continue
		}
		if len(line) == 0 || len(d.lines) > 20000 {
			continue
		}
		q := strconv.Quote(string(line[:min(len(line), 200)]))
		d.lines = append(d.lines, fmt.Sprintf("%s%d: %s", who, n, strings.TrimSuffix(q[1:len(q)-1], `\r\n`)))
	}
}

// ended is how many connections have ended, as seen by the client's reads.
func (d *dialogue) ended() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ends
}

func (d *dialogue) note(n int, text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, fmt.Sprintf("!%d: %s", n, text))
}

func (d *dialogue) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Join(d.lines, "\n")
}

// isText distinguishes SMTP from TLS records.
func isText(b []byte) bool {
	return b[0] >= ' ' && b[0] < 0x7f || b[0] == '\r' || b[0] == '\n' || b[0] >= 0x80
}

// recordedConn records its traffic in a dialogue.
type recordedConn struct {
	net.Conn
	to *dialogue
	n  int
}

func (c *recordedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.to.add(c.n, "S", p[:n])
	}
	if err == nil {
		return n, nil
	}
	c.to.note(c.n, "read: "+err.Error())
	if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
		c.to.mu.Lock()
		c.to.ends++
		c.to.mu.Unlock()
	}
	return n, err
}

func (c *recordedConn) Write(p []byte) (int, error) {
	c.to.add(c.n, "C", p)
	n, err := c.Conn.Write(p)
	if err != nil {
		c.to.note(c.n, "write: "+err.Error())
	}
	return n, err
}

func (c *recordedConn) Close() error {
	c.to.note(c.n, "closed by the client")
	return c.Conn.Close()
}

// SetLinger lets the client reset the connection; the client looks for it on what Dial returned.
func (c *recordedConn) SetLinger(sec int) error { return c.Conn.(*net.TCPConn).SetLinger(sec) }

// CloseWrite is like SetLinger.
func (c *recordedConn) CloseWrite() error { return c.Conn.(*net.TCPConn).CloseWrite() }
