package smtptest

import (
	"bufio"
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// readBuffer is the longest command line, and the most that is read from a client at once.
const readBuffer = 64 << 10

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// conn is a connection as the relay sees it. It stands between the client and go-smtp's server: it ends TCP and TLS, knows
// which command each reply belongs to, and lets the faults loose; go-smtp parses the commands and judges their order. It
// hands go-smtp one command at a time, and flushes the replies when it has nothing more to read.
type conn struct {
	s    *Server
	wire *wire
	cut  chan struct{} // closed by abandon
	once sync.Once     // of abandon

	// owned by the connection's goroutine, and by that of go-smtp while it is asked something
	rw         io.ReadWriter // the wire, or TLS on it
	tls        *tls.Conn     // nil in the clear
	br         *bufio.Reader
	bw         *bufio.Writer
	back       *netpipe.Conn // to go-smtp
	backR      *bufio.Reader
	line       []byte // what is sent to go-smtp
	events     [steps]int
	authed     bool
	authLed    bool                  // the last AUTH had more behind it
	path       string                // of the MAIL or RCPT that go-smtp is asked about, as it stands between the brackets
	ours       smtprelay.MailOptions // the parameters of that MAIL that go-smtp is not asked about
	env        envelope
	msg        incoming
	metBody    []*FaultHandle // that have met the body
	finalTurns int64          // turns when the last final dot was answered; -1 if none was since the last MAIL
	refuse     int            // how many of the octets read are behind a final dot and refused for it
	discard    bool           // a fault wants what has arrived behind the command under way thrown away

	// guarded by s.mu
	stats       ConnStats
	turnsBefore int    // before the one that brought the first MAIL
	where       string // what it does, for whoever wonders why it does not end
	idle        bool   // it waits for a command, and may be woken
	woken       bool   // by moving the read deadline
	lingering   bool
	over        bool
}

// envelope is what a transaction has collected. go-smtp's goroutine fills it in.
type envelope struct {
	open        bool // MAIL was accepted
	from        string
	to          []string
	mailOptions smtprelay.MailOptions
	rcptOptions []smtprelay.RcptOptions
	chunks      int // BDAT commands so far
}

// ending says how a connection goes on.
type ending int

const (
	goOn   ending = iota
	hangUp        // close as a relay should: TLS's close_notify, FIN
	drop          // FIN alone
	reset         // RST
	lost          // the client has closed, or the relay was cut off
)

func newConn(s *Server, l link, number int) *conn {
	c := &conn{s: s, cut: make(chan struct{}), finalTurns: -1, where: "connecting"}
	c.wire = &wire{link: l, in: bufio.NewReaderSize(l, readBuffer), delay: s.Delay}
	c.rw = c.wire
	c.br = bufio.NewReaderSize(input{c}, readBuffer)
	c.bw = bufio.NewWriter(output{c})
	c.msg = incoming{max: s.MaxSize, drop: s.DropBodies}
	c.stats = ConnStats{Conn: number, Commands: make(map[string]int)}
	return c
}

// input reads from the client, once everything is sent that it may be waiting for. If that cannot be sent any more, what the
// client said before it went is still heard: a relay takes a message whose sender does not wait for the reply.
type input struct{ c *conn }

func (in input) Read(p []byte) (int, error) {
	in.c.bw.Flush()
	return in.c.rw.Read(p)
}

type output struct{ c *conn }

func (out output) Write(p []byte) (int, error) { return out.c.rw.Write(p) }

// run is the connection's goroutine. It ends when either side closes, or when abandon cuts it off.
func (c *conn) run(opened time.Time) {
	end := lost
	if c.arrive(opened) {
		end = c.talk()
	}
	c.leave(end)
}

// arrive waits, on a link with a delay, until the client's acknowledgement of the connection has come; only then has the
// relay got it.
func (c *conn) arrive(opened time.Time) bool {
	if c.s.Delay == 0 {
		return true
	}
	return c.pause(time.Until(opened.Add(c.s.Delay / 2)))
}

// talk holds the whole dialogue and returns how it ended.
func (c *conn) talk() ending {
	refused := c.enter()
	if c.s.implicitTLS {
		if end := c.handshake(); end != goOn {
			return end
		}
	}
	if refused {
		c.say("421 4.7.0 Too many concurrent SMTP connections")
		return hangUp
	}
	b := c.meet(Event{Step: Connect})
	if c.tls == nil && b.end != lost && c.wire.Unread() > 0 {
		c.say("421 4.5.0 You talk too soon")
		return hangUp
	}
	greeting := func() string { return "220 SG ESMTP service ready at " + c.s.Name }
	if end := c.answer(b, greeting); end != goOn {
		return end
	}
	if !c.dialBackend() {
		return lost
	}
	for {
		if c.discard {
			c.discardArrived()
		}
		line, end := c.command()
		if end == goOn {
			end = c.do(line)
		}
		if end != goOn {
			return end
		}
	}
}

// enter counts the connection and reports whether it is one too many.
func (c *conn) enter() (refused bool) {
	s := c.s
	c.note("opened by ", c.wire.RemoteAddr().String())
	s.mu.Lock()
	defer s.mu.Unlock()
	c.stats.Open = true
	s.open++
	s.maxOpen = max(s.maxOpen, s.open)
	if s.MaxConns > 0 && s.open > s.MaxConns {
		c.stats.Refused = true
		s.refused421++
	}
	return c.stats.Refused
}

// exit counts the connection as closed.
func (c *conn) exit() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.stats.Open {
		c.stats.Open = false
		c.s.open--
	}
}

// leave closes the connection.
func (c *conn) leave(end ending) {
	c.is("sending the last reply")
	if end != lost {
		c.bw.Flush()
	}
	c.exit() // before the client can see it
	c.note("closed")
	if c.back != nil {
		c.back.Close()
	}
	switch end {
	case reset:
		c.wire.Reset()
	case hangUp, drop:
		if end == hangUp && c.tls != nil {
			c.tls.CloseWrite()
		}
		c.wire.CloseWrite()
		c.linger()
	}
	c.wire.Close()
	c.s.mu.Lock()
	c.over = true
	c.s.mu.Unlock()
}

// linger reads on until the client has closed too.
func (c *conn) linger() {
	c.s.mu.Lock()
	c.where = "waiting for the client to close"
	c.lingering = true
	c.wire.SetReadDeadline(time.Now().Add(lingerTime))
	if c.s.closing {
		c.wakeLocked()
	}
	c.s.mu.Unlock()
	io.Copy(io.Discard, c.wire.link)
}

// abandon ends the connection from any goroutine.
func (c *conn) abandon() {
	c.once.Do(func() {
		c.exit()
		close(c.cut)
		c.wire.Close()
	})
}

// wakeLocked makes a connection that is idle look around, and one that lingers hurry.
func (c *conn) wakeLocked() {
	switch {
	case c.idle:
		c.woken = true
		c.wire.SetReadDeadline(longAgo)
	case c.lingering && c.s.closing:
		c.wire.SetReadDeadline(time.Now().Add(c.s.Delay + 50*time.Millisecond))
	}
}

// is remembers what the connection does.
func (c *conn) is(where string) {
	c.s.mu.Lock()
	c.where = where
	c.s.mu.Unlock()
}

func (c *conn) whereLocked() string {
	return fmt.Sprintf("%s, after %d messages begun and %d accepted", c.where, c.stats.Mails, c.stats.Accepted)
}

// say puts a reply, whose lines are separated by "\n", into the write buffer.
func (c *conn) say(reply string) {
	for line := range strings.SplitSeq(reply, "\n") {
		c.log("S", line)
		c.bw.WriteString(line)
		c.bw.WriteString("\r\n")
	}
}

// positive reports whether a reply is a 2xx or 3xx one.
func positive(reply string) bool {
	if len(reply) < 3 {
		return false
	}
	code, err := strconv.Atoi(reply[:3])
	return err == nil && 200 <= code && code < 400
}

// answer says the reply of carry, or what the blow has in its place.
func (c *conn) answer(b blow, carry func() string) ending {
	reply := b.reply
	if !b.refuses() {
		own := carry()
		if own == "" {
			return lost
		}
		if reply == "" {
			reply = own
		}
	}
	if reply != "" {
		c.say(reply)
	}
	return b.end
}

// command reads the next command that is to be carried out.
func (c *conn) command() (string, ending) {
	for {
		if c.br.Buffered() == 0 {
			if end := c.await(); end != goOn {
				return "", end
			}
		}
		line, n, end := c.readLine()
		if end != goOn || c.refuse == 0 {
			return line, end
		}
		// It came behind a final dot, which this relay does not like.
		c.refuse = max(0, c.refuse-n)
		c.log("C", redact(line))
		verb, arg, _ := strings.Cut(line, " ")
		verb = strings.ToUpper(verb)
		if _, known := commands[verb]; !known {
			verb = ""
		}
		c.count(verb)
		if chunk, _, ok := parseBdat(arg); ok && verb == "BDAT" && !c.s.KeepRefusedChunks {
			n, err := io.CopyN(io.Discard, c.br, chunk)
			if err != nil {
				return "", lost
			}
			c.refuse = max(0, c.refuse-int(n))
		}
		c.say("503 5.5.1 pipelined after end of DATA")
	}
}

// readLine reads a line and returns it without its end, and its length with it.
func (c *conn) readLine() (line string, n int, end ending) {
	raw, err := c.br.ReadSlice('\n')
	if err == bufio.ErrBufferFull {
		c.say("500 5.5.2 Line too long")
		return "", 0, hangUp
	}
	if err != nil {
		return "", 0, lost
	}
	n = len(raw)
	raw = raw[:n-1]
	if len(raw) > 0 && raw[len(raw)-1] == '\r' {
		raw = raw[:len(raw)-1]
	}
	return string(raw), n, goOn
}

// await waits, everything having been answered, until the client says something.
func (c *conn) await() ending {
	c.bw.Flush()
	since := time.Now()
	var spared []*FaultHandle // have decided not to strike this time
	for {
		h, due, ok := c.beginWait(since, spared)
		if !ok {
			c.say("421 4.3.2 " + c.s.Name + " is shutting down")
			return hangUp
		}
		_, err := c.br.Peek(1)
		c.endWait()
		if err == nil {
			return goOn
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return lost
		}
		if h == nil || time.Now().Before(due) {
			continue // woken for another reason
		}
		c.events[Idle]++
		e := Event{Step: Idle, Conn: c.stats.Conn, N: c.events[Idle], Message: c.events[Mail]}
		spared = append(spared, h)
		if !h.f.concerns(&e) || !h.strikes(true) {
			continue
		}
		b, done := c.suffer(h, Idle)
		if b.reply != "" {
			c.say(b.reply)
			c.bw.Flush()
		}
		if done && b.end != goOn {
			return b.end
		}
	}
}

// nextIdleFault returns the fault that will strike first if the connection stays idle, and when.
func (c *conn) nextIdleFault(since time.Time, spared []*FaultHandle) (first *FaultHandle, due time.Time) {
	for _, h := range c.s.faultList() {
		if h.f.At != Idle || h.f.Conn != 0 && h.f.Conn != c.stats.Conn || slices.Contains(spared, h) {
			continue
		}
		if at := since.Add(h.f.Delay); first == nil || at.Before(due) {
			first, due = h, at
		}
	}
	return first, due
}

// beginWait notes that the connection waits for a command: until due, if that is not zero, when h wants to strike or, without
// h, a relay that is being closed loses its patience. It reports false if a relay that is being closed waits no more. Faults
// are looked at under the lock under which the connection becomes idle: one that is set later finds it so and wakes it.
func (c *conn) beginWait(since time.Time, spared []*FaultHandle) (h *FaultHandle, due time.Time, ok bool) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.where = "waiting for a command"
	if c.env.open {
		c.where += " in a transaction"
	}
	switch {
	case c.s.closing:
		if since.Before(c.s.closedAt) {
			since = c.s.closedAt
		}
		due = since.Add(c.s.Delay + lastWords)
		if !c.env.open || !time.Now().Before(due) {
			return nil, due, false
		}
	case !c.env.open:
		h, due = c.nextIdleFault(since, spared)
	}
	c.idle = true
	if !due.IsZero() {
		c.woken = true
		c.wire.SetReadDeadline(due)
	}
	return h, due, true
}

func (c *conn) endWait() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.idle = false
	c.where = "carrying out a command"
	if c.woken {
		c.woken = false
		c.wire.SetReadDeadline(time.Time{})
	}
}

// commands are the verbs that the relay knows.
var commands = map[string]Step{
	"EHLO": EHLO, "HELO": EHLO, "STARTTLS": StartTLS, "AUTH": Auth, "MAIL": Mail, "RCPT": Rcpt, "DATA": Data, "BDAT": Bdat,
	"RSET": Rset, "NOOP": Noop, "QUIT": Quit, "VRFY": Other, "EXPN": Other, "HELP": Other,
}

// do carries out a command.
func (c *conn) do(line string) ending {
	line = strings.TrimRight(line, " \t")
	verb, arg, _ := strings.Cut(line, " ")
	verb = strings.ToUpper(verb)
	step, known := commands[verb]
	if !known {
		step, verb = Other, ""
	}
	c.log("C", redact(line))
	c.count(verb)
	if strings.ContainsAny(line, "\r\x00") {
		c.say("500 5.5.2 Bare CR or NUL in a command")
		return goOn
	}
	if !c.s.pipelining && step != Bdat && c.crowded() {
		c.say("500 5.5.1 Invalid command: Pipelining not supported")
		return hangUp
	}

	switch step {
	case EHLO:
		if c.crowded() { // RFC 2920, 3.1: the last of its group
			c.say("554 5.5.0 SMTP protocol error: commands behind " + verb)
			return hangUp
		}
		return c.answer(c.meet(Event{Step: EHLO, Line: line}), func() string { return c.greet(verb, line) })
	case StartTLS:
		return c.startTLS(line)
	case Auth:
		return c.auth(line)
	case Mail:
		return c.mail(line, arg)
	case Rcpt:
		c.path = path(arg)
		b := c.meet(Event{Step: Rcpt, Line: line, Rcpt: c.path})
		return c.answer(b, func() string {
			_, params := c.cutPath(line)
			if _, misplaced := c.cutUrgency(params); len(misplaced) > 0 {
				return "555 5.5.4 Not a parameter of RCPT: " + misplaced[0]
			}
			return c.askAbout(line, "250 Recipient address accepted")
		})
	case Data:
		return c.data(line)
	case Bdat:
		return c.bdat(line, arg)
	case Quit:
		end := c.answer(c.meet(Event{Step: Quit, Line: line}), func() string { return "221 See you later" })
		return max(end, hangUp)
	}
	return c.answer(c.meet(Event{Step: step, Line: line}), func() string {
		if !known {
			return "500 5.5.2 Command not recognized"
		}
		if step == Rset && c.s.KeepEnvelopeOnRset && c.env.open {
			c.env.chunks = 0
			return "250 2.0.0 Session reset"
		}
		reply := c.ask(line)
		if step == Rset {
			c.env = envelope{}
		}
		return reply
	})
}

// crowded reports whether something stands behind a command that must be the last of its group, on a relay that minds. One
// that takes chunks for commands does not: a body has no pauses.
func (c *conn) crowded() bool { return c.br.Buffered() > 0 && !c.s.KeepRefusedChunks }

// count counts a command.
func (c *conn) count(verb string) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.stats.Commands[verb]++
	if verb == "AUTH" {
		c.stats.Auths++
	}
}

// redact returns a command line without the secrets that AUTH carries.
func redact(line string) string {
	if f := strings.SplitN(line, " ", 3); len(f) == 3 && strings.EqualFold(f[0], "AUTH") {
		return f[0] + " " + f[1] + " [redacted]"
	}
	return line
}

// path returns the path of a MAIL or RCPT command as it stands between its brackets.
func path(arg string) string {
	_, p, _ := strings.Cut(arg, ":")
	p = strings.TrimLeft(p, " ")
	if !strings.HasPrefix(p, "<") {
		p, _, _ = strings.Cut(p, " ")
		return p
	}
	quoted := false
	for i := 1; i < len(p); i++ {
		switch {
		case p[i] == '\\' && quoted:
			i++
		case p[i] == '"':
			quoted = !quoted
		case p[i] == '>' && !quoted:
			return p[1:i]
		}
	}
	return p[1:]
}

// greet carries out EHLO or HELO.
func (c *conn) greet(verb, line string) string {
	reply := c.ask(line)
	if !positive(reply) {
		return reply
	}
	c.env = envelope{}
	if verb == "HELO" {
		return "250 " + c.s.Name
	}
	lines := append([]string{c.s.Name}, c.s.ehlo...)
	if c.canStartTLS() {
		lines = append(lines, "STARTTLS")
	}
	if !c.s.NoAuth && !c.canStartTLS() && len(c.s.Mechanisms) > 0 {
		mechanisms := strings.Join(c.s.Mechanisms, " ")
		lines = append(lines, "AUTH "+mechanisms, "AUTH="+mechanisms) // the second is for clients older than RFC 2554
	}
	return "250-" + strings.Join(lines[:len(lines)-1], "\n250-") + "\n250 " + lines[len(lines)-1]
}

// canStartTLS reports whether STARTTLS is offered now.
func (c *conn) canStartTLS() bool { return c.s.tlsConfig != nil && c.tls == nil }

// startTLS carries out STARTTLS. It is not for go-smtp, which sees one plain connection before it and another one after it.
func (c *conn) startTLS(line string) ending {
	b := c.meet(Event{Step: StartTLS, Line: line})
	if !c.canStartTLS() {
		return c.answer(b, func() string { return "502 5.5.1 STARTTLS not offered" })
	}
	end := c.answer(b, func() string { return "220 Begin TLS negotiation now" })
	if end != goOn || b.refuses() {
		return end
	}
	c.br.Discard(c.br.Buffered()) // said in the clear, and to be forgotten
	c.bw.Flush()
	if end := c.handshake(); end != goOn {
		return end
	}
	c.env, c.authed = envelope{}, false
	c.back.Close()
	if !c.dialBackend() {
		return lost
	}
	return goOn
}

func (c *conn) handshake() ending {
	c.is("in the TLS handshake")
	if b := c.meet(Event{Step: TLSHandshake}); b.reply != "" || b.end != goOn {
		if b.reply != "" {
			c.say(b.reply)
		}
		return max(b.end, hangUp)
	}
	t := tls.Server(&records{wire: c.wire}, c.s.tlsConfig)
	if err := t.Handshake(); err != nil {
		c.note("TLS handshake: ", err.Error())
		return lost
	}
	st := t.ConnectionState()
	if st.Version >= tls.VersionTLS13 {
		c.wire.answered = false // a session ticket is nothing that a client waits for
	}
	c.tls, c.rw = t, t
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.stats.TLS, c.stats.TLSResumed = true, st.DidResume
	return goOn
}

// auth carries out AUTH, all its rounds included.
func (c *conn) auth(line string) ending {
	e := Event{Step: Auth, Line: redact(line)}
	c.authLed = c.pipelined(&e)
	b := c.meet(e)
	if b.refuses() {
		return c.answer(b, nil)
	}
	if c.canStartTLS() {
		return c.answer(b, func() string { return "530 5.7.0 Must issue a STARTTLS command first" })
	}
	challenge := "" // a fault's, in place of go-smtp's
	if b.challenges() {
		f := strings.Fields(line)
		line = strings.Join(f[:min(2, len(f))], " ")
		b, challenge = blow{}, b.reply
	}
	reply := c.ask(line)
	for strings.HasPrefix(reply, "334") {
		c.say(cmp.Or(challenge, reply))
		response, _, end := c.readLine()
		if end != goOn {
			return end
		}
		c.log("C", "[redacted]")
		r := c.meet(Event{Step: AuthResponse})
		if r.refuses() {
			c.ask("*")
			return c.answer(r, nil)
		}
		if r.challenges() {
			challenge = r.reply
			continue
		}
		if r != (blow{}) {
			b = r
		}
		challenge, reply = "", c.ask(response)
	}
	if reply == "" {
		return lost
	}
	if positive(reply) {
		c.authed = true
		c.s.mu.Lock()
		c.stats.Authenticated = true
		c.s.mu.Unlock()
		reply = "235 Authentication successful"
	}
	return c.answer(b, func() string { return reply })
}

// mail carries out MAIL.
func (c *conn) mail(line, arg string) ending {
	s := c.s
	turns := c.wire.turns.Load()
	s.mu.Lock()
	if c.stats.Mails++; c.stats.Mails == 1 {
		c.turnsBefore = max(0, int(turns)-1)
	}
	if c.finalTurns == turns {
		c.stats.Overlapped++
	}
	tooMany := s.MaxMessages > 0 && c.stats.Mails > s.MaxMessages
	s.mu.Unlock()
	c.finalTurns = -1

	c.path = path(arg)
	b := c.meet(Event{Step: Mail, Line: line, From: c.path})
	if tooMany && !b.refuses() {
		s.mu.Lock()
		s.refused421++
		s.mu.Unlock()
		c.say("421 4.7.0 Too many messages in this connection")
		return hangUp
	}
	return c.answer(b, func() string {
		command, params := c.cutPath(line)
		params, size, tooBig := bigSize(params, s.MaxSize)
		if tooBig {
			return "552 5.3.4 Max message size exceeded"
		}
		if c.env.open { // go-smtp lets a second one pass
			return "503 5.5.1 Sender already given"
		}
		params, urgency := c.cutUrgency(params)
		c.ours = smtprelay.MailOptions{Size: size}
		for _, field := range urgency {
			if !readUrgency(&c.ours, field) {
				return "501 5.5.4 Malformed parameter " + field
			}
		}
		return c.askAbout(command+params, "250 Sender address accepted")
	})
}

// cutPath parts a MAIL or RCPT command behind c.path, in which there may be spaces and equals signs too.
func (c *conn) cutPath(line string) (command, params string) {
	end := strings.Index(line, c.path) + len(c.path)
	return line[:end], line[end:]
}

// bigSize takes SIZE= out of the parameters of MAIL if it does not fit into the 32 bits that go-smtp has for it.
func bigSize(params string, limit int64) (string, int64, bool) {
	for field := range strings.FieldsSeq(params) {
		if len(field) < 5 || !strings.EqualFold(field[:5], "SIZE=") {
			continue
		}
		if n, err := strconv.ParseInt(field[5:], 10, 64); err == nil && n >= 1<<32 {
			return strings.Replace(params, " "+field, "", 1), n, limit > 0 && n > limit
		}
	}
	return params, 0, false
}

// cutUrgency takes BY= and MT-PRIORITY= out of parameters, where they are offered. They belong to MAIL (RFC 2852, 4;
// RFC 6710, 3); go-smtp reads them there since its version 0.26, and behind RCPT before.
func (c *conn) cutUrgency(params string) (rest string, urgency []string) {
	rest = params
	for field := range strings.FieldsSeq(params) {
		keyword, _, _ := strings.Cut(strings.ToUpper(field), "=")
		if keyword == "BY" && c.s.offers("DELIVERBY") || keyword == "MT-PRIORITY" && c.s.offers("MT-PRIORITY") {
			rest = strings.Replace(rest, " "+field, "", 1)
			urgency = append(urgency, field)
		}
	}
	return rest, urgency
}

var (
	byParam       = regexp.MustCompile(`^(?i:BY)=([-+]?[0-9]{1,9});([NRnr])([Tt]?)$`)
	priorityParam = regexp.MustCompile(`^(?i:MT-PRIORITY)=(0|-?[1-9])$`)
)

// readUrgency reads a parameter that cutUrgency has found into o. It reports false where that is malformed.
func readUrgency(o *smtprelay.MailOptions, field string) bool {
	if m := priorityParam.FindStringSubmatch(field); m != nil {
		n, _ := strconv.Atoi(m[1])
		o.Priority = &n
		return true
	}
	m := byParam.FindStringSubmatch(field)
	if m == nil {
		return false
	}
	seconds, _ := strconv.Atoi(m[1])
	o.DeliverBy = &smtprelay.DeliverBy{
		Time:  time.Duration(seconds) * time.Second,
		Mode:  smtprelay.DeliverByMode(strings.ToUpper(m[2])),
		Trace: m[3] != "",
	}
	return o.DeliverBy.Mode == smtprelay.DeliverByNotify || seconds > 0 // a time that has passed cannot be kept
}

// askAbout asks go-smtp about c.path, unless it is to be rejected, and puts it in SendGrid's words if it agrees.
func (c *conn) askAbout(line, accepted string) string {
	if reply, ok := c.s.Reject[strings.ToLower(c.path)]; ok {
		return reply
	}
	if c.env.chunks > 0 {
		return underWay
	}
	reply := c.ask(line)
	if positive(reply) {
		return accepted
	}
	return reply
}

// underWay is what commands are told that have no place between the chunks of a message.
const underWay = "503 5.5.1 A message is under way"

// data carries out DATA and all that follows it.
func (c *conn) data(line string) ending {
	if c.crowded() || !c.s.KeepRefusedChunks && c.wire.Unread() > 0 { // RFC 2920, 3.1: the last of its group; the body is not for the asking
		c.say("554 5.5.0 SMTP protocol error: nothing may follow DATA before its reply")
		return hangUp
	}
	var own string
	b := c.meet(Event{Step: Data, Line: line})
	end := c.answer(b, func() string {
		if c.env.chunks > 0 {
			own = underWay
			return own
		}
		if own = c.ask(line); positive(own) {
			return "354 Continue"
		}
		return own
	})
	said := own
	if b.reply != "" {
		said = b.reply
	}
	if end != goOn || !strings.HasPrefix(said, "354") {
		return end
	}
	taking := positive(own)
	c.beginBody()
	early, end := c.readBody()
	if end != goOn {
		return end
	}
	c.log("C", ".")
	if !c.s.pipelining && c.crowded() {
		c.say("500 5.5.1 Invalid command: Pipelining not supported")
		return hangUp
	}
	return c.finish(early, func() string {
		if !taking {
			return "554 5.5.1 No valid recipients"
		}
		return c.ask(".")
	})
}

// finish ends a message whose last octet has come. early says that a fault has already answered it.
func (c *conn) finish(early bool, ask func() string) ending {
	c.is("answering the final dot")
	var before blow
	if !early {
		before = c.meet(Event{Step: FinalDot, Bytes: c.msg.size})
	}
	if before.refuses() && before.reply == "" {
		return before.end
	}
	c.msg.refused = c.msg.refused || early || before.refuses()
	own := ask()
	if own == "" {
		return lost
	}
	reply, end := own, before.end
	if before.reply != "" {
		reply = before.reply
	}
	if c.msg.taken {
		after := c.meet(Event{Step: Accepted, Bytes: c.msg.size})
		if after.reply != "" {
			reply = after.reply
		} else if after.end != goOn {
			return after.end
		}
		end = max(end, after.end)
	}
	c.env = envelope{}
	if end == goOn {
		c.mindBehind()
	}
	if !early {
		c.say(reply)
	}
	c.finalTurns = c.wire.turns.Load()
	return end
}

// mindBehind does to what has arrived behind the final dot what Behind says.
func (c *conn) mindBehind() {
	if c.s.Behind == HabitNone {
		return
	}
	switch c.s.Behind {
	case HabitRefuse:
		c.refuse = c.arrived()
	case HabitDiscard:
		c.discard = true
	}
}

// arrived reads what has arrived into the buffer, and returns how much that is.
func (c *conn) arrived() int {
	for c.wire.Unread() > 0 && c.br.Buffered() < c.br.Size() {
		if _, err := c.br.Peek(c.br.Buffered() + 1); err != nil {
			break
		}
	}
	return c.br.Buffered()
}

// discardArrived throws away what has arrived.
func (c *conn) discardArrived() {
	c.discard = false
	if n := c.arrived(); n > 0 {
		c.note("discarded what was pipelined: ", strconv.Itoa(n), " octets")
		c.br.Discard(n)
	}
}
