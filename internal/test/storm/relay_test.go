// The storm's strict relay, its faults and its ledger.
package storm

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// stormRelay is a strict SMTP server that fails in every way that its weather allows. It checks the client's grammar, limits and
// pipelining (RFC 2920), and keeps a ledger: a message is in it once its final dot was read and the relay has decided to accept
// it, whether or not the reply arrives. Its random choices come from the seed and the number of the connection, so that one seed
// repeats the same faults as far as the scheduler allows.
type stormRelay struct {
	seed    uint64
	w       stormWeather
	happens func(at stormStage, msg int) // called at each step before its reply; msg is -1 if there is none
	log     *stormLog
	over    chan struct{} // closed at the end of a run: stalls end, and what was sent is read
	writes  atomic.Int64  // number of transactions begun and final dots that clients have written
	serving sync.WaitGroup

	mu         sync.Mutex // guards the fields below; never held across I/O
	conns      []*stormConn
	mostOpen   int                     // the most connections that were open at once
	faults     map[stormFault]int      // deliberate faults
	attempts   map[int][]*stormAttempt // by message, oldest first
	said       map[stormSaid]bool      // every reply
	violations []string
}

// stormStage is a step of the dialogue at which something can go wrong.
type stormStage string

const (
	atDial     stormStage = "dial"
	atGreeting stormStage = "greeting"
	atEHLO     stormStage = "EHLO"
	atTLS      stormStage = "STARTTLS"
	atAuth     stormStage = "AUTH"
	atMail     stormStage = "MAIL"
	atRcpt     stormStage = "RCPT"
	atData     stormStage = "DATA"
	atBdat     stormStage = "BDAT"
	atBody     stormStage = "body"      // in the middle of a body or a chunk
	atDot      stormStage = "final dot" // the final dot or the last chunk
	atRset     stormStage = "RSET"
	atQuit     stormStage = "QUIT"
)

// stormSaid is a reply as the client should parse it.
type stormSaid struct {
	code int
	text string // the lines without enhanced codes, joined by "\n"
}

// stormAttempt is a transaction as the relay saw it. Its connection's goroutine writes it, its recipients under the relay's lock;
// it is read after that goroutine has ended.
type stormAttempt struct {
	msg      int // -1 until an address names it
	conn     *stormConn
	sent     *stormSending // nil if it came over TLS
	mail     stormSaid
	rcpts    []stormRcpt
	declared int // SIZE; 0 means not declared
	data     int // the code of the reply to DATA, or 354 if there was a chunk; 0 means none
	dotRead  bool
	chunks   []byte // of the body so far
	chunked  bool
	failed   bool // a chunk was refused: only RSET is possible
	taken    bool
	problem  string // the fault of the body that was accepted
	queueID  string
	final    stormSaid
	answered bool // final was sent completely and well-formed, and the client could receive it
}

type stormRcpt struct {
	to       string
	said     stormSaid
	accepted bool
}

func (a *stormAttempt) accepted() (n int) {
	for _, r := range a.rcpts {
		if r.accepted {
			n++
		}
	}
	return n
}

func newStormRelay(seed uint64, w stormWeather) *stormRelay {
	return &stormRelay{
		seed:     seed,
		w:        w,
		happens:  func(stormStage, int) {},
		log:      &stormLog{began: time.Now()},
		over:     make(chan struct{}),
		faults:   map[stormFault]int{},
		attempts: map[int][]*stormAttempt{},
		said:     map[stormSaid]bool{},
	}
}

// finish ends all stalls and waits until every connection has ended; the client must have closed its ends.
func (r *stormRelay) finish() {
	close(r.over)
	r.serving.Wait()
}

// dial is the client's Config.Dial.
func (r *stormRelay) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	client, server := netpipe.New(r.w.buffer)
	c := &stormConn{r: r, nc: server, up: -1, down: -1}
	c.rd, c.wr = stormWire{server, c}, stormWire{server, c}
	c.client = &stormClientConn{Conn: client, c: c, sendings: map[int][]*stormSending{}}
	r.mu.Lock()
	r.conns = append(r.conns, c)
	c.n = len(r.conns)
	c.open = r.openConnsLocked()
	r.mostOpen = max(r.mostOpen, c.open)
	r.mu.Unlock()
	c.rng = stormRand(r.seed, 1000+uint64(c.n))
	if c.open > r.w.maxConns {
		c.violation("%d connections open, the cap is %d", c.open, r.w.maxConns)
	}
	pause := c.latency()
	switch c.roll(atDial) {
	case refuseDial:
		return nil, c.refuseDial(syscall.ECONNREFUSED)
	case stall:
		pause = c.stallTime()
	}
	if pause > 0 {
		timer := time.NewTimer(pause)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil, c.refuseDial(context.Cause(ctx))
		case <-r.over:
			return nil, c.refuseDial(syscall.ECONNREFUSED)
		}
	}
	c.log("--", "connected")
	r.serving.Go(c.serve) // ends with the connection
	return c.client, nil
}

// openConnsLocked counts connections like a relay: from the first packet until the relay has closed. But the client need not wait
// for that longer than its time-out after QUIT or its own close, and a reset connection is not open.
func (r *stormRelay) openConnsLocked() (n int) {
	for _, c := range r.conns {
		left, over := c.client.whenLeft()
		if !c.gone && !over && (left.IsZero() || time.Since(left) < r.w.quit) {
			n++
		}
	}
	return n
}

// stormClientConn is the client's end of a connection, and observes it.
type stormClientConn struct {
	*netpipe.Conn
	c *stormConn

	mu       sync.Mutex // guards the fields below
	looked   int        // octets passed to Write
	wrote    int        // octets of these that were sent
	dots     []stormDot // final dots among these that were not sent yet
	quitEnd  int        // the end of QUIT, like stormDot's end; 0 means none
	line     []byte     // the beginning of the current line
	chunk    int        // octets of a chunk not written yet
	ended    bool       // the current line ends a message
	current  *stormSending
	sendings map[int][]*stormSending // by message
	left     time.Time               // when the client gave up the connection
	closed   bool
	reset    bool
}

// stormSending is a transaction as the client wrote it. The numbers count the client's writes over all connections; 0 means not
// yet.
type stormSending struct {
	mail    int64
	dot     atomic.Int64
	perhaps atomic.Bool // the last octet passed to Write may have been the final dot
	carried atomic.Bool // the final dot was written together with the envelope of another message
}

// Write records when transactions begin, and when their final dots are sent. It sees nothing that goes over TLS.
func (e *stormClientConn) Write(p []byte) (int, error) {
	e.look(p)
	n, err := e.Conn.Write(p)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.wrote += n
	for len(e.dots) > 0 && e.dots[0].end <= e.wrote {
		e.dots[0].of.dot.Store(e.c.r.writes.Add(1))
		e.dots = e.dots[1:]
	}
	if e.quitEnd > 0 && e.quitEnd <= e.wrote && e.left.IsZero() {
		e.left = time.Now()
	}
	return n, err
}

// stormDot is a final dot that is being written.
type stormDot struct {
	of  *stormSending
	end int // in octets of the connection
}

// look finds transactions in data that is being written, so that they are known before the relay reads them. The rest of a write
// that stopped half-way is not looked at again.
func (e *stormClientConn) look(p []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	begin := func(line string) {
		if id := stormID(line); id >= 0 {
			e.current = &stormSending{mail: e.c.r.writes.Add(1)}
			e.sendings[id] = append(e.sendings[id], e.current)
			for _, dot := range e.dots {
				dot.of.carried.Store(true)
			}
		}
	}
	for at := e.looked - e.wrote; at < len(p); at = e.looked - e.wrote {
		if e.chunk > 0 {
			k := min(e.chunk, len(p)-at)
			e.looked, e.chunk = e.looked+k, e.chunk-k
			continue
		}
		text, _, ended := bytes.Cut(p[at:], []byte("\n"))
		e.line = append(e.line, text[:min(len(text), 100)]...)
		e.looked += len(text)
		switch end := strings.TrimSuffix(string(e.line), "\r"); {
		case e.ended || e.current == nil:
		case string(e.line) == "." && !ended:
			e.current.perhaps.Store(true) // or the beginning of a line of the body with a doubled dot
		case end == "." || end == "BDAT 0 LAST":
			// A relay may accept it without the line end if the connection has closed.
			e.dots = append(e.dots, stormDot{e.current, e.looked - len(e.line) + len(end)})
			e.ended = true
		}
		if !ended {
			break
		}
		e.looked++
		switch line := string(e.line); {
		case strings.HasPrefix(line, "MAIL FROM:<"):
			e.current = nil
			begin(line)
		case strings.HasPrefix(line, "RCPT TO:<") && e.current == nil:
			begin(line)
		case strings.HasPrefix(line, "BDAT "):
			e.chunk, _ = stormChunk(line)
		case line == "QUIT\r":
			e.quitEnd = e.looked
		}
		e.line, e.ended = e.line[:0], false
	}
}

// stormChunk parses a BDAT command; a negative size means malformed.
func stormChunk(line string) (size int, last bool) {
	line = strings.TrimSuffix(line, "\r")
	number, last := strings.CutSuffix(strings.TrimPrefix(line, "BDAT "), " LAST")
	size, err := strconv.Atoi(number)
	if err != nil {
		return -1, last
	}
	return size, last
}

// sending returns the oldest sending of a message not returned before; nil if there is none.
func (e *stormClientConn) sending(msg int) (s *stormSending) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if all := e.sendings[msg]; len(all) > 0 {
		s, e.sendings[msg] = all[0], all[1:]
	}
	return s
}

func (e *stormClientConn) leave(closed bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = e.closed || closed
	if e.left.IsZero() {
		e.left = time.Now()
	}
}

func (e *stormClientConn) whenLeft() (at time.Time, over bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.left, e.reset || e.closed && e.c.r.w.tls // over TLS, QUIT may have been sent long before
}

// SetLinger is the client's way to reset.
func (e *stormClientConn) SetLinger(sec int) error {
	e.mu.Lock()
	e.reset = true
	e.mu.Unlock()
	return e.Conn.SetLinger(sec)
}

func (e *stormClientConn) Close() error {
	e.leave(true)
	return e.Conn.Close()
}

func (e *stormClientConn) CloseWrite() error {
	e.leave(false)
	return e.Conn.CloseWrite()
}

// stormConn is one connection, served by one goroutine, which owns all fields without another comment.
type stormConn struct {
	r      *stormRelay
	n      int // 1-based
	rng    *rand.Rand
	nc     *netpipe.Conn
	client *stormClientConn
	open   int  // number of open connections when this one arrived
	gone   bool // guarded by r.mu: the relay has closed, or sent FIN; the client cannot distinguish them

	rd       io.Reader // a stormWire, or TLS over one
	wr       io.Writer
	up, down int        // octets from and to the client until the connection is cut; negative means never
	drip     bool       // replies are sent a few octets at a time
	deaf     bool       // the client can no longer receive
	space    [2048]byte // read buffer
	buf      []byte     // read, not processed yet
	behind   int        // how much of buf arrived in one piece with a final dot, which this relay does not accept
	unasked  time.Time  // when to send 421 unasked; zero means never

	secure, authed, greeted bool // TLS; AUTH; EHLO or HELO
	ehloRefused, helo       bool
	authRefused             bool // what was sent together with AUTH is not the client's fault
	mailRefused             bool // the same for RCPT and DATA
	rsetRefused             bool // the same for MAIL
	confused                bool // commands and replies may be out of step, by the relay's fault
	leaving                 bool // 421 or similar was sent: nothing more is accepted
	asked                   bool // the client has probed what happens to a refused chunk
	quit                    bool // QUIT was answered: nothing more may arrive
	stalled                 bool
	faults                  int           // deliberate faults on this connection
	mails, taken            int           // MAIL commands; final dots
	tx                      *stormAttempt // begun by MAIL, ended by RSET or an accepted message
	unnamed                 *stormAttempt // begun by MAIL FROM:<>
}

var errStormOver = errors.New("the relay ends the connection")

func (c *stormConn) log(dir, text string) { c.r.log.add(c.n, dir, text) }

func (c *stormConn) violation(format string, args ...any) {
	text := fmt.Sprintf("connection %d: ", c.n) + fmt.Sprintf(format, args...)
	c.log("!!", text)
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	if len(c.r.violations) < 10 {
		c.r.violations = append(c.r.violations, text)
	}
}

// grammar reports a violation, unless it can be a consequence of the relay's own faults.
func (c *stormConn) grammar(excused bool, format string, args ...any) {
	if !excused && !c.confused {
		c.violation(format, args...)
	}
}

// roll draws the fault of this step; usually none.
func (c *stormConn) roll(at stormStage) stormFault {
	w := &c.r.w
	if len(w.faults) == 0 || w.only != "" && w.only != at || c.rng.IntN(1000) >= w.rate {
		return noFault
	}
	f := w.faults[c.rng.IntN(len(w.faults))]
	if !f.fits(at) {
		return noFault
	}
	c.wrong(f, string(at))
	return f
}

func (c *stormConn) wrong(f stormFault, at string) {
	c.faults++
	c.log("**", f.String()+" at "+at)
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.r.faults[f]++
}

func (c *stormConn) refuseDial(err error) error {
	c.client.Close()
	c.end("dial: " + err.Error())
	return &net.OpError{Op: "dial", Net: "pipe", Err: err}
}

func (c *stormConn) end(why string) {
	c.goes()
	c.nc.Close()
	c.log("--", why)
}

// goes marks the connection as closed by the relay, before the client can see it.
func (c *stormConn) goes() {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.gone = true
}

func (c *stormConn) closeWrite() {
	c.goes()
	c.nc.CloseWrite()
}

func (c *stormConn) latency() time.Duration {
	if c.r.w.latency == 0 {
		return 0
	}
	return time.Duration(c.rng.Int64N(int64(c.r.w.latency)))
}

func (c *stormConn) stallTime() time.Duration {
	c.stalled = true
	return []time.Duration{2 * time.Second, 20 * time.Second, 4 * time.Minute, time.Hour}[c.rng.IntN(4)]
}

// sleep waits for d, or until the end of the run.
func (c *stormConn) sleep(d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.r.over:
	}
}

// drop ends the connection without a reply.
func (c *stormConn) drop(why string) {
	c.goes()
	if c.rng.IntN(2) == 0 {
		c.log("--", why+": reset")
		c.nc.Reset()
	} else {
		c.log("--", why+": closed")
		c.nc.Close()
	}
	c.deaf = true
}

// halfClose sends FIN but keeps reading and accepting.
func (c *stormConn) halfClose() {
	c.log("--", "half-closed")
	c.closeWrite()
	c.deaf = true
}

func (c *stormConn) serve() {
	err := c.greet()
	for err == nil {
		err = c.next()
	}
	if errors.Is(err, io.EOF) || c.quit {
		c.sleep(c.r.w.linger) // until then the relay counts the connection
	}
	c.end("gone: " + err.Error())
}

func (c *stormConn) greet() error {
	w := &c.r.w
	if c.rng.IntN(1000) < w.cuts { // anywhere in the life of the connection, early or late with equal likelihood
		c.wrong(cutAnywhere, "some octet")
		octet := 1 << c.rng.IntN(14)
		octet = octet/2 + c.rng.IntN(octet)
		if c.rng.IntN(2) == 0 {
			c.up = octet
		} else {
			c.down = octet
		}
	}
	if c.rng.IntN(1000) < w.unasked {
		c.wrong(unasked421, "some time")
		c.unasked = time.Now().Add(time.Duration(c.rng.Int64N(int64(30 * time.Second))))
	}
	if w.connCap > 0 && c.open > w.connCap {
		c.sleep(c.latency())
		return c.bye(stormReply{421, "4.7.0", "too many connections from you"})
	}
	yes, err := c.answer(atGreeting, stormReply{220, "", "relay.example ESMTP storm"})
	c.leaving = c.leaving || !yes
	return err
}

// next reads a command and replies to it.
func (c *stormConn) next() error {
	line, err := c.command()
	if err != nil {
		return err
	}
	c.log("<", strings.TrimRight(line, "\r\n"))
	text, ended := strings.CutSuffix(line, "\r\n")
	c.grammar(ended && !strings.ContainsAny(text, "\r\n\x00"), "the command %q does not end in CRLF", line)
	line = text
	verb, _, _ := strings.Cut(line, " ")
	switch {
	case c.quit:
		return errStormOver // a violation that line has reported
	case c.leaving && verb == "QUIT":
		return c.quitReceived()
	case c.leaving: // like Exim, which repeats it
		if err := c.swallow(line); err != nil {
			return err
		}
		return c.bye(stormReply{421, "4.3.2", "leaving, as said before"})
	case c.behind > 0: // like Haraka
		c.behind = max(0, c.behind-len(line)-len("\r\n"))
		switch verb {
		case "MAIL":
			c.note(&stormAttempt{conn: c}, line) // an empty attempt: there is no transaction
		case "RCPT":
			c.named(line)
		case "QUIT":
			c.client.leave(false)
		}
		c.mailRefused, c.rsetRefused = true, true
		return c.write(stormReply{503, "5.5.1", "pipelined after end of DATA"})
	case !c.greeted && verb != "EHLO" && verb != "HELO" && verb != "QUIT":
		c.grammar(c.ehloRefused, "%q before EHLO", line)
		return c.write(stormReply{503, "5.5.1", "EHLO first"})
	}
	switch verb {
	case "EHLO", "HELO":
		return c.ehlo(line)
	case "STARTTLS":
		return c.startTLS(line)
	case "AUTH":
		return c.auth(line)
	case "MAIL":
		return c.mail(line)
	case "RCPT":
		return c.rcpt(line)
	case "DATA":
		return c.data(line)
	case "BDAT":
		return c.bdat(line)
	case "RSET":
		return c.rset(line)
	case "QUIT":
		return c.quitReceived()
	}
	c.grammar(false, "unexpected command %q", line)
	return c.write(stormReply{500, "5.5.2", "what"})
}

func (c *stormConn) ehlo(line string) error {
	w := &c.r.w
	c.grammar(line == "EHLO client.example" || line == "HELO client.example" && c.ehloRefused, "%q", line)
	offers := []string{"relay.example"}
	if c.helo = strings.HasPrefix(line, "HELO"); !c.helo {
		offers = append(offers, "8BITMIME", "SIZE 100000000", "ENHANCEDSTATUSCODES")
		if w.pipelining {
			offers = append(offers, "PIPELINING")
		}
		if w.chunking {
			offers = append(offers, "CHUNKING")
		}
		if w.tls && !c.secure {
			offers = append(offers, "STARTTLS")
		} else if w.auth != "" {
			offers = append(offers, "AUTH "+w.auth)
		}
		if limits := w.announced(); limits != "" {
			offers = append(offers, limits)
		}
		c.rng.Shuffle(len(offers)-1, func(i, j int) { offers[i+1], offers[j+1] = offers[j+1], offers[i+1] })
	}
	yes, err := c.answer(atEHLO, stormReply{250, "", strings.Join(offers, "\n")})
	if yes && c.greeted { // it replaces a RSET that was refused
		c.tx, c.mailRefused, c.rsetRefused = nil, false, false
	}
	c.greeted, c.ehloRefused = yes || c.greeted, !yes
	return err
}

func (c *stormConn) startTLS(line string) error {
	c.grammar(line == "STARTTLS" && !c.secure && c.r.w.tls && !c.helo, "STARTTLS was not offered")
	yes, err := c.answer(atTLS, stormReply{220, "2.0.0", "go ahead"})
	if err != nil || !yes {
		return err
	}
	server := tls.Server(stormWire{c.nc, c}, stormTLS().server.Clone())
	if err := server.Handshake(); err != nil {
		c.log("--", "TLS handshake: "+err.Error())
		return errStormOver
	}
	c.rd, c.wr, c.secure, c.greeted, c.buf = server, server, true, false, nil
	return nil
}

func (c *stormConn) auth(line string) error {
	c.grammar(!c.authed && c.tx == nil && c.mayTalk() && c.r.w.auth != "" && !c.helo, "AUTH is out of place")
	want := "AUTH PLAIN " + base64.StdEncoding.EncodeToString([]byte("\x00"+stormUser+"\x00"+stormPassword))
	if !strings.Contains(c.r.w.auth, "PLAIN") {
		want = "AUTH LOGIN"
	}
	c.grammar(line == want, "%q, want %q", line, want)
	if want == "AUTH LOGIN" {
		for _, step := range []struct{ ask, want string }{{"VXNlcm5hbWU6", stormUser}, {"UGFzc3dvcmQ6", stormPassword}} {
			c.alone(atAuth, 0)
			if err := c.write(stormReply{334, "", step.ask}); err != nil {
				return err
			}
			got, err := c.line()
			if err != nil {
				return err
			}
			c.grammar(got == base64.StdEncoding.EncodeToString([]byte(step.want))+"\r\n", "AUTH LOGIN: %q", got)
		}
		c.alone(atAuth, 0)
	}
	yes, err := c.answer(atAuth, stormReply{235, "2.7.0", "welcome"})
	c.authed, c.authRefused = yes, !yes
	return err
}

// mayTalk reports whether TLS is active if it is required.
func (c *stormConn) mayTalk() bool { return c.secure || !c.r.w.tls }

func (c *stormConn) countMail() {
	c.mails++
	if most := c.r.w.maxMails(c.helo); most > 0 && c.mails > most {
		c.violation("MAIL number %d, the cap is %d", c.mails, most)
	}
}

// note records a transaction under the message that an address names; the null reverse-path names none, but the first recipient
// will.
func (c *stormConn) note(a *stormAttempt, line string) {
	if a.msg, c.unnamed = stormID(line), nil; a.msg < 0 {
		c.unnamed = a
		return
	}
	a.sent = c.client.sending(a.msg)
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.r.attempts[a.msg] = append(c.r.attempts[a.msg], a)
}

// named returns the number of the message that a RCPT command names.
func (c *stormConn) named(line string) int {
	if c.unnamed != nil {
		c.note(c.unnamed, line)
	}
	return stormID(line)
}

func (c *stormConn) mail(line string) error {
	c.countMail()
	a := &stormAttempt{conn: c}
	c.note(a, line)
	refuse := func(r stormReply) error {
		c.mailRefused = true
		a.mail = r.said()
		return c.write(r)
	}
	switch {
	case !c.mayTalk():
		c.grammar(false, "MAIL without TLS")
		return refuse(stormReply{530, "5.7.0", "STARTTLS first"})
	case c.r.w.auth != "" && !c.authed && !c.helo:
		c.grammar(c.authRefused, "MAIL without AUTH")
		return refuse(stormReply{530, "5.7.0", "AUTH first"})
	case c.tx != nil:
		c.grammar(c.rsetRefused, "MAIL in an open transaction: %s", line)
		return refuse(stormReply{503, "5.5.1", "nested MAIL"})
	case c.r.w.mailCap > 0 && c.mails > c.r.w.mailCap:
		r := stormReply{421, "4.7.0", "too many messages in this connection"}
		a.mail = r.said()
		return c.bye(r)
	}
	params := []string{"SIZE=", "BODY=8BITMIME", "BODY=7BIT"}
	if c.helo {
		params = nil
	}
	c.wellFormed(line, "MAIL FROM:<", params...)
	if _, size, ok := strings.Cut(line, " SIZE="); ok {
		size, _, _ = strings.Cut(size, " ")
		a.declared, _ = strconv.Atoi(size)
	}
	r := c.yes("2.1.0", "sender of "+strconv.Itoa(a.msg)+" ok")
	f := c.roll(atMail)
	if no, ok := f.refusal(c, atMail, a.msg); ok {
		r = no
	}
	c.rsetRefused = false
	if c.mailRefused = r.code/100 != 2; !c.mailRefused {
		c.tx = a
	}
	a.mail = r.said()
	return c.deliver(atMail, a.msg, r, f)
}

// wellFormed checks MAIL and RCPT against RFC 5321, 4.1.2, and their parameters against the extensions offered.
func (c *stormConn) wellFormed(line, prefix string, params ...string) {
	rest, ok := strings.CutPrefix(line, prefix)
	path, rest, closed := strings.Cut(rest, ">")
	ok = ok && closed && !strings.ContainsAny(path, " <\t") && (rest == "" || rest[0] == ' ')
	for p := range strings.FieldsSeq(rest) {
		ok = ok && slices.ContainsFunc(params, func(q string) bool {
			return p == q || strings.HasSuffix(q, "=") && strings.HasPrefix(p, q) && len(p) > len(q)
		})
	}
	c.grammar(ok, "malformed: %q", line)
}

func (c *stormConn) rcpt(line string) error {
	a, w, msg := c.tx, &c.r.w, c.named(line)
	if a == nil || a.dotRead {
		c.grammar(c.mailRefused, "RCPT outside a transaction: %s", line)
		return c.write(stormReply{503, "5.5.1", "MAIL first"})
	}
	c.wellFormed(line, "RCPT TO:<")
	path, _, _ := strings.Cut(strings.TrimPrefix(line, "RCPT TO:<"), ">")
	c.grammar(msg == a.msg || c.mailRefused, "recipient %s in the transaction of message %d", path, a.msg)
	if most := w.maxRcpts(c.helo); most > 0 && len(a.rcpts) >= most {
		c.grammar(c.mailRefused, "RCPT number %d in a transaction, the cap is %d", len(a.rcpts)+1, most)
	}
	r := c.yes("2.1.5", path+" ok")
	var f stormFault
	switch {
	case strings.HasPrefix(path, "gone"):
		r = stormReply{550, "5.1.1", path + " is unknown here"}
	case strings.HasPrefix(path, "grey") && c.triesOf(a.msg, path) < 2:
		r = stormReply{450, "4.2.1", path + " later"}
	case w.rcptCap > 0 && a.accepted() >= w.rcptCap:
		r = stormReply{w.rcptCapCode, fmt.Sprintf("%d.5.3", w.rcptCapCode/100), "too many recipients"}
	default:
		f = c.roll(atRcpt)
		if no, ok := f.refusal(c, atRcpt, a.msg); ok {
			r = no
		}
	}
	c.r.mu.Lock()
	a.rcpts = append(a.rcpts, stormRcpt{path, r.said(), r.code/100 == 2})
	c.r.mu.Unlock()
	return c.deliver(atRcpt, a.msg, r, f)
}

// triesOf returns how often this recipient was named before.
func (c *stormConn) triesOf(msg int, path string) (n int) {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	for _, a := range c.r.attempts[msg] {
		for _, r := range a.rcpts {
			if r.to == path {
				n++
			}
		}
	}
	return n
}

func (c *stormConn) data(line string) error {
	a := c.tx
	c.grammar(line == "DATA", "%q", line)
	switch {
	case a == nil || a.dotRead || a.chunked || len(a.rcpts) == 0:
		c.grammar(c.mailRefused, "DATA outside a transaction")
		return c.write(stormReply{503, "5.5.1", "MAIL first"})
	case a.accepted() == 0 && !c.r.w.goesOn:
		a.data = 554
		return c.deliver(atData, a.msg, stormReply{554, "5.5.1", "no valid recipients"}, noFault)
	}
	r := stormReply{354, "", "go ahead"}
	f := c.roll(atData)
	if no, ok := f.refusal(c, atData, a.msg); ok {
		r = no
	}
	a.data = r.code
	if err := c.deliver(atData, a.msg, r, f); err != nil || r.code != 354 {
		return err
	}
	return c.body(a)
}

// swallow reads the chunk of a command that is refused.
func (c *stormConn) swallow(line string) error {
	if !strings.HasPrefix(line, "BDAT ") {
		return nil
	}
	size, _ := stormChunk(line)
	_, err := c.octets(size)
	return err
}

// octets reads n octets of a chunk, or as many as arrive.
func (c *stormConn) octets(n int) (got []byte, err error) {
	for {
		k := min(len(c.buf), n-len(got))
		got, c.buf = append(got, c.buf[:k]...), c.buf[k:]
		if len(got) >= n {
			return got, nil
		}
		if err := c.fill(); err != nil {
			return got, err
		}
	}
}

// bdat reads a chunk (RFC 3030) and replies to it.
func (c *stormConn) bdat(line string) error {
	a := c.tx
	size, last := stormChunk(line)
	c.grammar(size >= 0 && c.r.w.chunking && !c.helo, "%q", line)
	if a == nil || a.dotRead || len(a.rcpts) == 0 {
		asks := c.mails == 0 && size == 8 && !last && !c.asked // the probe whether a refused chunk is discarded
		c.asked = c.asked || asks
		c.grammar(c.mailRefused || asks, "BDAT outside a transaction")
		if err := c.swallow(line); err != nil {
			return err
		}
		return c.write(stormReply{503, "5.5.1", "MAIL first"})
	}
	if trouble := c.roll(atBody); trouble != noFault {
		got, err := c.octets(c.rng.IntN(size + 1))
		a.chunks, size = append(a.chunks, got...), size-len(got)
		if err == nil {
			err = c.trouble(trouble)
		}
		if err != nil {
			return c.chunkLost(a, last, err)
		}
	}
	a.chunked, a.data = true, 354
	c.r.happens(atBody, a.msg)
	got, err := c.octets(size)
	a.chunks = append(a.chunks, got...)
	if err != nil {
		return c.chunkLost(a, last, err)
	}
	c.log("<", fmt.Sprintf("[chunk of %d, %d octets so far]", a.msg, len(a.chunks)))
	c.grammar(a.declared == 0 || len(a.chunks) <= a.declared, "%d octets in chunks, declared were %d", len(a.chunks), a.declared)
	switch {
	case a.failed:
		r := stormReply{503, "5.5.1", "a chunk before has failed"}
		if a.dotRead = last; last {
			a.answered, a.final = true, r.said()
		}
		return c.write(r)
	case last:
		a.dotRead = true
		return c.verdict(a, a.chunks)
	}
	r := c.yes("2.0.0", strconv.Itoa(len(got))+" octets")
	f := c.roll(atBdat)
	if no, ok := f.refusal(c, atBdat, a.msg); ok {
		r = no
	}
	a.failed = r.code/100 != 2 || a.accepted() == 0
	return c.deliver(atBdat, a.msg, r, f)
}

// chunkLost ends a connection that was lost in a chunk. Some relays accept the truncated last chunk if the connection ends
// without a reset (seen in go-smtp).
func (c *stormConn) chunkLost(a *stormAttempt, last bool, err error) error {
	c.log("<", fmt.Sprintf("[chunk of %d, lost after %d octets]", a.msg, len(a.chunks)))
	if last && c.r.w.takesTruncated && errors.Is(err, io.EOF) && !a.failed {
		c.verdict(a, a.chunks)
	}
	return err
}

// trouble is a fault in the middle of a body.
func (c *stormConn) trouble(f stormFault) error {
	switch f {
	case say421:
		if err := c.bye(stormReply{421, "4.3.0", "unwell"}); err != nil {
			return err
		}
		return errStormOver
	case stall:
		c.sleep(c.stallTime())
	case dropConn:
		c.drop("in the body")
		return errStormOver
	case halfClose:
		c.halfClose()
	}
	return nil
}

// body reads a message to its final dot, and replies to it.
func (c *stormConn) body(a *stormAttempt) error {
	trouble, when := c.roll(atBody), c.rng.IntN(600)
	var got bytes.Buffer
	for lines := 0; ; lines++ {
		if trouble != noFault && got.Len() >= when {
			if err := c.trouble(trouble); err != nil {
				return err
			}
			trouble = noFault
		}
		line, err := c.line()
		if err != nil {
			c.log("<", fmt.Sprintf("[%d octets of a body]", got.Len()))
			return err
		}
		if lines == 3 {
			c.r.happens(atBody, a.msg)
		}
		text, ended := strings.CutSuffix(line, "\r\n")
		c.grammar(ended && !strings.ContainsAny(text, "\r\n"), "a line of the body ends in %q", line[max(0, len(line)-3):])
		if text == "." {
			break
		}
		text, dot := strings.CutPrefix(text, ".")
		c.grammar(!dot || strings.HasPrefix(text, "."), "the line %q of the body is not dot-stuffed", "."+text)
		got.WriteString(text + "\r\n")
	}
	a.dotRead = true
	c.log("<", fmt.Sprintf("[%d octets of body, and the final dot of %d]", got.Len(), a.msg))
	if n := len(c.buf); n > 0 {
		switch c.r.w.habit {
		case refusesOverlap:
			c.behind = n
		case discardsOverlap:
			c.log("--", fmt.Sprintf("discards %q", c.buf))
			if bytes.Contains(c.buf, []byte("QUIT\r\n")) {
				c.client.leave(false)
			}
			c.buf, c.confused = nil, true
		}
	}
	return c.verdict(a, got.Bytes())
}

// verdict accepts the message or refuses it, and only then replies.
func (c *stormConn) verdict(a *stormAttempt, body []byte) error {
	c.taken++
	queueID := fmt.Sprintf("Q%d.%d", c.n, c.taken)
	r := c.yes("2.0.0", "Ok: queued as "+queueID)
	f := c.roll(atDot)
	if no, ok := f.refusal(c, atDot, a.msg); ok {
		r = no
	}
	if a.accepted() == 0 {
		c.grammar(len(body) == 0 || a.chunked, "a body without recipient in the transaction of message %d", a.msg)
		if r.code == 250 && c.rng.IntN(2) == 0 {
			r = stormReply{554, "5.5.1", "no valid recipients"}
		}
	}
	taken := r.code/100 == 2 || f == oddReply && c.rng.IntN(2) == 0
	if a.taken = taken && a.accepted() > 0; a.taken {
		a.queueID = queueID
		if id, err := stormCheckBody(body); err != nil {
			a.problem = err.Error()
		} else if id != a.msg {
			a.problem = fmt.Sprintf("the body is that of message %d", id)
		}
		c.log("++", fmt.Sprintf("%d is accepted as %s for %d", a.msg, queueID, a.accepted()))
	}
	if taken {
		c.tx = nil // a failed one stays open until RSET: RFC 5321, 4.1.4
	}
	err := c.deliver(atDot, a.msg, r, f)
	if a.answered = (err == nil || f == say421) && f.speaks() && !c.deaf; a.answered {
		a.final = r.said()
	}
	return err
}

func (c *stormConn) rset(line string) error {
	c.grammar(line == "RSET", "%q", line)
	c.grammar(c.mails > 0 || c.asked, "RSET before the first MAIL")
	r := c.yes("2.0.0", "forgotten")
	f := c.roll(atRset)
	if no, ok := f.refusal(c, atRset, -1); ok {
		r = no
	}
	if c.rsetRefused = r.code/100 != 2; !c.rsetRefused {
		c.tx, c.mailRefused = nil, false
	}
	return c.deliver(atRset, -1, r, f)
}

func (c *stormConn) quitReceived() error {
	c.client.leave(false) // over TLS it could not be seen earlier
	yes, err := c.answer(atQuit, stormReply{221, "2.0.0", "bye"})
	if err != nil {
		return err
	}
	if c.quit = true; yes && c.rng.IntN(2) == 0 { // close at once; else when the client does
		return errStormOver
	}
	return nil
}

// stormReply is a reply of the relay.
type stormReply struct {
	code int
	enh  string // the enhanced code; "" means none
	text string // lines separated by "\n"
}

func (r stormReply) said() stormSaid { return stormSaid{r.code, r.text} }

func (r stormReply) String() string {
	var b strings.Builder
	lines := strings.Split(r.text, "\n")
	for i, text := range lines {
		sep := "-"
		if i == len(lines)-1 {
			sep = " "
		}
		b.WriteString(strconv.Itoa(r.code) + sep)
		if r.enh != "" {
			b.WriteString(r.enh + " ")
		}
		b.WriteString(text + "\r\n")
	}
	return b.String()
}

// yes returns a positive reply in one of the forms that relays use.
func (c *stormConn) yes(enh, text string) stormReply {
	r := stormReply{250, enh, text}
	switch c.rng.IntN(30) {
	case 0:
		r.code = 251
	case 1:
		r.code = 200
	case 2:
		r.text += "\nand more of it"
	case 3, 4:
		r.enh = ""
	}
	return r
}

// answer replies to commands outside transactions; it reports whether the reply was positive.
func (c *stormConn) answer(at stormStage, r stormReply) (bool, error) {
	f := c.roll(at)
	if no, ok := f.refusal(c, at, -1); ok {
		r = no
	}
	err := c.deliver(at, -1, r, f)
	return r.code/100 == 2 && f.speaks(), err
}

// deliver sends r as the fault allows.
func (c *stormConn) deliver(at stormStage, msg int, r stormReply, f stormFault) error {
	c.r.happens(at, msg)
	c.sleep(c.latency())
	switch w := &c.r.w; {
	case at == atDot && w.acrossOK():
	case at == atDot:
		c.alone(at, len("QUIT\r\n")) // the relay sees this too late to object
	case at == atGreeting, at == atEHLO, at == atTLS, at == atData, at == atQuit, !w.withinOK(), c.helo:
		c.alone(at, 0)
	}
	if at != atDot && !c.unasked.IsZero() && !time.Now().Before(c.unasked) { // at the dot a 421 would contradict the decision
		return c.bye(stormReply{421, "4.3.2", "shutting down"})
	}
	switch f {
	case say421:
		return c.bye(r)
	case dropConn:
		c.drop("before the reply")
		return errStormOver
	case cutReply:
		c.down = c.rng.IntN(len(r.String()))
		if _, err := io.WriteString(c.wr, r.String()); err == nil {
			c.drop("within the reply")
		}
		return errStormOver
	case halfClose:
		c.halfClose()
		return nil
	case stall:
		c.sleep(c.stallTime())
	case drip:
		c.drip = true
	case garbage:
		c.confused = true
		return c.raw(stormGarbage[c.rng.IntN(len(stormGarbage))])
	case longLine:
		c.confused = true // the client may use it or not
		return c.raw(strconv.Itoa(r.code) + " " + strings.Repeat("x", 1<<c.rng.IntN(20)) + "\r\n")
	case manyLines:
		c.confused = true
		return c.raw(strings.Repeat(strconv.Itoa(r.code)+"-more\r\n", 1<<c.rng.IntN(14)) + strconv.Itoa(r.code) + " done\r\n")
	case oddReply:
		c.confused = true
	}
	return c.write(r)
}

// write sends r unchanged.
func (c *stormConn) write(r stormReply) error {
	c.r.mu.Lock()
	c.r.said[r.said()] = true
	c.r.mu.Unlock()
	return c.raw(r.String())
}

func (c *stormConn) raw(text string) error {
	if len(text) > 400 {
		c.log(">", fmt.Sprintf("%q and %d octets more", text[:40], len(text)-40))
	} else {
		c.log(">", strings.TrimSuffix(text, "\r\n"))
	}
	_, err := io.WriteString(c.wr, text)
	if errors.Is(err, syscall.EPIPE) {
		c.deaf = true
		return nil // nobody receives it, but what was sent is still read and accepted
	}
	return err
}

// bye sends 421 and stops serving the client: nothing more is accepted on this connection.
func (c *stormConn) bye(r stormReply) error {
	c.leaving = true
	if err := c.write(r); err != nil {
		return err
	}
	switch c.r.w.leaves {
	case leavesOpen:
		return nil
	case leavesAtOnce:
		return errStormOver
	}
	c.closeWrite() // gracefully: no earlier reply is lost
	c.nc.SetReadDeadline(time.Now().Add(10 * time.Second))
	io.Copy(io.Discard, c.nc)
	return errStormOver
}

// alone reports what the client has sent after a command whose reply it must await.
func (c *stormConn) alone(at stormStage, but int) {
	if c.secure || c.leaving || c.behind > 0 {
		return
	}
	n := len(c.buf) + c.nc.Unread()
	c.grammar(n == 0 || n == but, "%d octets were sent after %v without waiting for its reply", n, at)
}

// command reads the next command. Meanwhile the connection is idle, for a limited time.
func (c *stormConn) command() (string, error) {
	var until time.Time
	if idle := c.r.w.idle; idle > 0 {
		until = time.Now().Add(idle)
	}
	if !c.unasked.IsZero() && (until.IsZero() || c.unasked.Before(until)) {
		until = c.unasked
	}
	c.nc.SetReadDeadline(until)
	line, err := c.line()
	if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() && !c.quit && !c.leaving {
		switch c.rng.IntN(3) {
		case 0:
			c.bye(stormReply{421, "4.4.2", "timeout exceeded"})
		case 1:
			c.bye(stormReply{451, "4.4.2", "Timeout - closing connection"})
		}
		return "", errStormOver
	}
	c.nc.SetReadDeadline(time.Time{})
	return line, err
}

// line returns the next line with its line end, whatever that is.
func (c *stormConn) line() (string, error) {
	for {
		if i := bytes.IndexByte(c.buf, '\n'); i >= 0 {
			line := string(c.buf[:i+1])
			c.buf = c.buf[i+1:]
			return line, nil
		}
		if err := c.fill(); err != nil {
			return "", err
		}
	}
}

// fill reads more.
func (c *stormConn) fill() error {
	n, err := c.rd.Read(c.space[:])
	if c.quit && n > 0 {
		c.violation("%q after QUIT", c.space[:n])
	}
	c.buf = append(c.buf, c.space[:n]...)
	return err
}

// stormWire is below TLS. It cuts the connection at a given octet of either direction, and splits the stream into pieces.
type stormWire struct {
	*netpipe.Conn
	c *stormConn
}

func (w stormWire) Read(p []byte) (int, error) {
	c := w.c
	if c.up == 0 {
		c.drop("cut while reading")
		return 0, errStormOver
	}
	if c.up > 0 {
		p = p[:min(len(p), c.up)]
	}
	if seg := c.r.w.segment; seg > 0 {
		p = p[:min(len(p), 1+c.rng.IntN(seg))]
	}
	n, err := w.Conn.Read(p)
	if c.up > 0 {
		c.up -= n
	}
	return n, err
}

func (w stormWire) Write(p []byte) (sent int, err error) {
	c := w.c
	for sent < len(p) {
		piece := p[sent:]
		if c.drip {
			piece = piece[:min(len(piece), 1+c.rng.IntN(7))]
			c.sleep(time.Duration(c.rng.IntN(400)) * time.Millisecond)
		}
		if c.down == 0 {
			c.drop("cut while writing")
			return sent, errStormOver
		}
		if c.down > 0 {
			piece = piece[:min(len(piece), c.down)]
		}
		n, err := w.Conn.Write(piece)
		sent += n
		if c.down > 0 {
			c.down -= n
		}
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}
