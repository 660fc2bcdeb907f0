// What is drawn from a seed: the relay, the client, the messages and their bodies, the end.
package storm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/big"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay"
)

// stormRand returns the random source for one purpose of one seed.
func stormRand(seed, purpose uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, purpose)) }

// chance returns true in percent of a hundred cases.
func chance(rng *rand.Rand, percent int) bool { return rng.IntN(100) < percent }

// pick draws one of several; likelier ones are listed more often.
func pick[T any](rng *rand.Rand, from ...T) T { return from[rng.IntN(len(from))] }

// stormWeather is the relay and the network of one seed.
type stormWeather struct {
	buffer     int           // of each direction of a connection, in octets
	segment    int           // reads return a random number of octets up to this; 0 means all available
	latency    time.Duration // each reply is delayed by a random time up to this
	pipelining bool          // offered
	chunking   bool          // offered
	mode       smtprelay.Pipelining
	habit      stormHabit
	// A truncated last chunk is accepted as the message if the client closes in the middle of it.
	takesTruncated bool
	tls            bool   // STARTTLS is offered and required
	auth           string // mechanisms; "" means none
	mailMax        int    // LIMITS MAILMAX; 0 means not announced
	rcptMax        int    // LIMITS RCPTMAX
	goesOn         bool   // 354 although every recipient was refused (RFC 2920, 3.1)
	rcptCap        int    // recipients of a transaction, not announced: more get 452 or 552
	rcptCapCode    int
	mailCap        int           // messages of a connection, not announced: more get 421
	connCap        int           // connections, not announced: more get 421
	idle           time.Duration // idle limit of a connection; 0 means none
	linger         time.Duration // how long the relay takes to close after QUIT or FIN
	leaves         stormLeave
	faults         []stormFault
	rate           int        // faults in a thousand steps
	only           stormStage // where faults happen; "" means anywhere
	cuts           int        // cut connections in a thousand
	unasked        int        // connections in a thousand that get an unasked 421

	// The client's settings that the relay checks.
	maxConns, maxMessages, maxRecipients int
	quit                                 time.Duration
}

// stormHabit is what the relay does with commands that arrive in one piece with a final dot.
type stormHabit int

const (
	takesOverlap    stormHabit = iota
	refusesOverlap             // 503 to each of them
	discardsOverlap            // discards them without a reply
)

// stormLeave is how the relay closes after 421.
type stormLeave int

const (
	leavesPolitely stormLeave = iota // FIN, reads on, closes
	leavesAtOnce                     // resets the connection if the client has sent more
	leavesOpen                       // does not close: 421 again and again
)

func (w *stormWeather) announced() string {
	var s string
	if w.mailMax > 0 {
		s += " MAILMAX=" + strconv.Itoa(w.mailMax)
	}
	if w.rcptMax > 0 {
		s += " RCPTMAX=" + strconv.Itoa(w.rcptMax)
	}
	if s != "" {
		s = "LIMITS" + s
	}
	return s
}

// least returns the lowest limit; 0 means none.
func least(limits ...int) (n int) {
	for _, l := range limits {
		if l > 0 && (n == 0 || l < n) {
			n = l
		}
	}
	return n
}

func (w *stormWeather) maxMails(helo bool) int {
	if helo {
		return least(w.maxMessages)
	}
	return least(w.maxMessages, w.mailMax)
}

func (w *stormWeather) maxRcpts(helo bool) int {
	if helo {
		return least(w.maxRecipients)
	}
	return least(w.maxRecipients, w.rcptMax)
}

// withinOK reports whether a command may follow another in one group.
func (w *stormWeather) withinOK() bool { return w.pipelining && w.mode != smtprelay.PipelineOff }

// acrossOK reports whether an envelope may follow the final dot.
func (w *stormWeather) acrossOK() bool { return w.pipelining && w.mode == smtprelay.PipelineAuto }

// calm reports whether every message must be accepted unless its caller gives up: the relay does nothing that it may not do.
func (w *stormWeather) calm() bool {
	return len(w.faults) == 0 && w.cuts == 0 && w.unasked == 0 &&
		(w.leaves == leavesPolitely || w.mailCap == 0 && w.connCap == 0 && w.idle == 0)
}

// stormFault is one thing that goes wrong.
type stormFault int

const (
	noFault stormFault = iota
	refuse4
	refuse5
	say421
	dropConn
	cutReply
	halfClose
	stall
	drip
	garbage
	longLine
	manyLines
	oddReply
	refuseDial
	cutAnywhere // this and the next are drawn once per connection, not at each step
	unasked421
	allStormFaults
)

func (f stormFault) String() string {
	return [...]string{"nothing", "4yz", "5yz", "421", "connection dropped", "reply cut", "half-close", "stall", "slow drip", "garbage",
		"a very long reply line", "very many reply lines", "a reply out of place", "connection refused", "cut", "421 unasked"}[f]
}

// fits reports whether the fault can happen at this step.
func (f stormFault) fits(at stormStage) bool {
	switch at {
	case atDial:
		return f == refuseDial || f == stall
	case atBody:
		return f == say421 || f == stall || f == dropConn || f == halfClose
	}
	return f != refuseDial // only for dials
}

// speaks reports whether the reply arrives, well-formed and in its place.
func (f stormFault) speaks() bool {
	switch f {
	case noFault, refuse4, refuse5, say421, stall, drip:
		return true
	}
	return false
}

// refusal is the relay's reply in place of a positive one.
func (f stormFault) refusal(c *stormConn, at stormStage, msg int) (stormReply, bool) {
	text := fmt.Sprintf("says %s on connection %d", at, c.n)
	if msg >= 0 {
		text = fmt.Sprintf("%s of message %d", text, msg)
	}
	switch {
	case f == say421:
		return stormReply{421, "4.3.0", text}, true
	case f == refuse4 && at == atAuth:
		return stormReply{454, "4.7.0", text}, true
	case f == refuse4:
		return stormReply{pick(c.rng, 450, 451, 452), "4.2.0", text}, true
	case f == refuse5 && at == atAuth:
		return stormReply{535, "5.7.8", text}, true
	case f == refuse5 && at == atEHLO:
		return stormReply{pick(c.rng, 502, 550), "5.5.1", text}, true
	case f == refuse5:
		return stormReply{pick(c.rng, 550, 553, 554), "5.2.0", text}, true
	case f == oddReply && at == atData:
		return stormReply{250, "2.0.0", text}, true
	case f == oddReply:
		return stormReply{354, "", text}, true
	}
	return stormReply{}, false
}

var stormGarbage = []string{
	"hello\r\n", "25\r\n", "2\r\n", "-\r\n", "999 what\r\n", "000 what\r\n", "250ok\r\n", "25o ok\r\n", "\x00\x01\x02\xff\r\n",
	"250:one\r\n", "HTTP/1.1 400 Bad Request\r\n", "+OK\r\n", "-250 no\r\n", " 250 ok\r\n", "2500 ok\r\n", "150 hm\r\n",
}

const (
	stormUser     = "apikey"
	stormPassword = "SG.storm-password-that-must-not-show"
)

// newStormWeather draws the relay of a seed.
func newStormWeather(rng *rand.Rand) (w stormWeather) {
	w.buffer = pick(rng, 0, 0, 4096, 512, 100)
	w.segment = pick(rng, 0, 0, 0, 1, 10, 100, 1000)
	w.latency = pick(rng, 0, time.Millisecond, 50*time.Millisecond, 50*time.Millisecond, 700*time.Millisecond)
	w.pipelining = chance(rng, 85)
	w.mode = pick(rng, smtprelay.PipelineAuto, smtprelay.PipelineAuto, smtprelay.PipelineAuto, smtprelay.PipelineAuto,
		smtprelay.PipelineWithin, smtprelay.PipelineOff)
	w.habit = pick(rng, takesOverlap, takesOverlap, takesOverlap, refusesOverlap, discardsOverlap)
	if w.chunking = chance(rng, 30); w.chunking {
		w.habit = takesOverlap // no relay that offers CHUNKING does otherwise
		w.takesTruncated = chance(rng, 50)
	}
	w.tls = chance(rng, 3)
	w.auth = pick(rng, "", "", "PLAIN LOGIN", "LOGIN")
	w.leaves = pick(rng, leavesPolitely, leavesPolitely, leavesAtOnce, leavesOpen)
	w.maxConns = pick(rng, 1, 1, 2, 3, 5)
	w.maxMessages = pick(rng, -1, 1, 2, 3, 5, 20)
	w.maxRecipients = pick(rng, 0, 0, 0, 1, 2, 3)
	w.quit = pick(rng, 5*time.Second, time.Second)
	w.linger = pick(rng, 0, 0, 0, 300*time.Millisecond, 3*time.Second, time.Minute)
	if chance(rng, 15) {
		w.mailMax = pick(rng, 1, 2, 4)
	}
	if chance(rng, 15) {
		w.rcptMax = pick(rng, 1, 2, 3)
	}
	w.goesOn = chance(rng, 30)
	if chance(rng, 20) {
		w.rcptCap, w.rcptCapCode = pick(rng, 1, 2, 3), pick(rng, 452, 452, 552)
	}
	if chance(rng, 20) {
		w.mailCap = pick(rng, 1, 2, 3, 8)
	}
	if chance(rng, 15) {
		w.connCap = pick(rng, 1, 2)
	}
	if chance(rng, 20) {
		w.idle = pick(rng, time.Second, 8*time.Second, 20*time.Second)
		if w.chunking {
			w.idle = max(w.idle, 8*time.Second) // a slow body takes time before its first chunk is written
		}
	}
	if chance(rng, 35) {
		w.leaves = leavesPolitely
		return w // usually calm
	}
	for f := noFault + 1; f < cutAnywhere; f++ {
		if chance(rng, 30) {
			w.faults = append(w.faults, f)
		}
	}
	w.rate = pick(rng, 5, 20, 50, 150)
	if chance(rng, 40) { // all faults at one step
		w.only = pick(rng, atDial, atGreeting, atEHLO, atAuth, atMail, atRcpt, atData, atData, atBody, atBody, atDot, atDot, atDot, atDot, atRset, atQuit)
		w.rate = pick(rng, 100, 300, 600)
	}
	w.cuts = pick(rng, 0, 0, 100, 500)
	w.unasked = pick(rng, 0, 0, 0, 200)
	return w
}

// stormMessage is one message and what its sender does with it.
type stormMessage struct {
	id           int
	from         string
	to           []string
	raw          []byte // the body as the sender gives it, with all kinds of line ends
	kind         stormBodyKind
	failAt       int  // where a failing body fails
	all          bool // AllOrNothing
	viaSendMail  bool
	pause        time.Duration // before it is sent
	giveUpAfter  time.Duration // cancels the context; 0 means never
	deadline     time.Duration // the context's; 0 means none
	giveUpAt     stormStage    // cancels the context when the relay has reached this step; "" means never
	giveUpInBody bool          // or in the middle of the body
}

// sound reports whether the body is complete.
func (m *stormMessage) sound() bool { return m.kind < bodyFails }

type stormBodyKind int

const (
	bodyBytes    stormBodyKind = iota
	bodyReader                 // can be written only once
	bodyPieces                 // small writes
	bodySlow                   // with pauses
	bodyFails                  // returns an error at failAt
	bodyNothing                // writes nothing, without an error
	bodyBadInput               // a Reader whose source fails at failAt
)

var errStormBody = errors.New("storm: the body fails")

// body returns the message's Body.
func (m *stormMessage) body(cancel context.CancelFunc) io.WriterTo {
	switch m.kind {
	case bodyBytes:
		return smtprelay.Bytes(m.raw)
	case bodyReader:
		return smtprelay.Reader(struct{ io.Reader }{bytes.NewReader(m.raw)})
	case bodyBadInput:
		return smtprelay.Reader(io.MultiReader(bytes.NewReader(m.raw[:m.failAt]), stormBadReader{}))
	}
	return &stormBody{m, cancel}
}

type stormBadReader struct{}

func (stormBadReader) Read([]byte) (int, error) { return 0, errStormBody }

// stormBody writes a message in pieces, slowly, or not to its end.
type stormBody struct {
	m      *stormMessage
	cancel context.CancelFunc
}

func (b *stormBody) WriteTo(to io.Writer) (sent int64, err error) {
	m := b.m
	raw := m.raw
	switch m.kind {
	case bodyNothing:
		return 0, nil
	case bodyFails:
		raw = raw[:m.failAt]
	}
	piece := len(raw)/7 + 1
	for i := 0; len(raw) > 0; i++ {
		if m.kind == bodySlow {
			time.Sleep(time.Duration(m.id%5) * 100 * time.Millisecond)
		}
		if m.giveUpInBody && i == 3 {
			b.cancel()
		}
		n, err := to.Write(raw[:min(piece, len(raw))])
		sent, raw = sent+int64(n), raw[n:]
		if err != nil {
			return sent, err
		}
	}
	if m.kind == bodyFails {
		return sent, errStormBody
	}
	return sent, nil
}

// stormText is the text of messages.
var stormText = strings.Repeat("abc . .def..ghi-jkl mno pqr st uvw.xyz", 10)

// stormPayload draws the text of a message. It returns it as the sender gives it and as the relay must get it.
func stormPayload(rng *rand.Rand, size int) (raw, want []byte) {
	afterCR := false
	for len(raw) < size {
		line := stormText[rng.IntN(200):][:pick(rng, 0, 1, 2, 20, 60, 75)]
		line = strings.Repeat(".", pick(rng, 0, 0, 0, 1, 2)) + line
		end := pick(rng, "\r\n", "\r\n", "\r\n", "\n", "\r")
		if len(raw)+len(line) >= size && chance(rng, 30) && len(line) > 0 {
			end = "" // the last line has no line end
		}
		if afterCR && len(line) == 0 {
			line = "x" // a CR and then LF would be one line end, not two
		}
		raw = append(append(raw, line...), end...)
		want = append(append(want, line...), "\r\n"...)
		if afterCR = end == "\r"; end == "" {
			break
		}
	}
	return raw, want
}

// newStormMessage draws a message. Its body contains its own length and checksum, so that nothing can be missing unnoticed.
func newStormMessage(rng *rand.Rand, id int, w *stormWeather) *stormMessage {
	m := &stormMessage{id: id, from: fmt.Sprintf("s.m%d@storm.example", id)}
	if chance(rng, 5) {
		m.from = ""
	}
	for i := range pick(rng, 1, 1, 1, 2, 3, 6) {
		m.to = append(m.to, fmt.Sprintf("%s%d.m%d@y.example", pick(rng, "ok", "ok", "ok", "ok", "ok", "ok", "ok", "ok", "gone", "grey"), i, id))
	}
	size := pick(rng, 0, 1, 100, 300, 1000, 1000, 5000)
	if rng.IntN(200) == 0 && w.segment != 1 && w.buffer != 100 {
		size = 100_000 // larger than any buffer
	}
	if w.segment == 1 {
		size = min(size, 300)
	}
	raw, want := stormPayload(rng, size)
	m.raw = append(fmt.Appendf(nil, "Subject: storm\r\nX-Storm: %d %d %d\n\r\n", id, len(want), stormSum(want)), raw...)
	m.kind = pick(rng, bodyBytes, bodyBytes, bodyBytes, bodyBytes, bodyReader, bodyReader, bodyPieces, bodySlow)
	if chance(rng, 6) {
		m.kind = pick(rng, bodyFails, bodyNothing, bodyBadInput)
		m.failAt = rng.IntN(len(m.raw))
	}
	m.all = chance(rng, 15)
	m.pause = pick(rng, 0, 0, 0, 0, 10*time.Millisecond, time.Second, 15*time.Second)
	if chance(rng, 15) {
		switch rng.IntN(4) {
		case 0:
			m.giveUpAfter = 1 + time.Duration(rng.Int64N(int64(pick(rng, 50*time.Millisecond, time.Second, 20*time.Second))))
		case 1:
			m.deadline = 1 + time.Duration(rng.Int64N(int64(pick(rng, 50*time.Millisecond, time.Second, 20*time.Second))))
		case 2:
			m.giveUpAt = pick(rng, atMail, atRcpt, atData, atBody, atDot)
		case 3:
			if m.kind == bodyBytes {
				m.kind = bodyPieces
			}
			m.giveUpInBody = m.kind == bodyPieces || m.kind == bodySlow
		}
	}
	m.viaSendMail = m.giveUpAfter == 0 && m.deadline == 0 && m.kind == bodyBytes && m.all
	return m
}

func stormSum(b []byte) uint64 {
	h := fnv.New64a()
	h.Write(b)
	return h.Sum64()
}

// stormCheckBody finds the message whose complete body this is.
func stormCheckBody(body []byte) (id int, err error) {
	var size int
	var sum uint64
	head, text, ok := bytes.Cut(body, []byte("\r\n\r\n"))
	if !ok {
		return 0, fmt.Errorf("a body of %d octets without a header: %.100q", len(body), body)
	}
	if _, err := fmt.Sscanf(string(head), "Subject: storm\r\nX-Storm: %d %d %d", &id, &size, &sum); err != nil {
		return 0, fmt.Errorf("the header %.100q: %w", head, err)
	}
	if len(text) != size || stormSum(text) != sum {
		return 0, fmt.Errorf("%d octets of text instead of %d, or a wrong checksum", len(text), size)
	}
	return id, nil
}

// stormID returns the number of the message from one of its addresses, or -1.
func stormID(line string) int {
	before, _, ok := strings.Cut(line, "@")
	if i := strings.LastIndex(before, ".m"); ok && i >= 0 {
		if id, err := strconv.Atoi(before[i+2:]); err == nil {
			return id
		}
	}
	return -1
}

// stormPlan is everything that a seed decides in advance.
type stormPlan struct {
	seed     uint64
	weather  stormWeather
	config   smtprelay.Config
	senders  [][]*stormMessage
	together []bool // senders that use SendAll
	breakAt  []int  // after how many results their loop ends early; 0 means never
	pings    int
	ending   stormEnding
	endAt    time.Duration // when Close or Shutdown is called during the work; 0 means afterwards
	grace    time.Duration // Shutdown's time limit
}

type stormEnding int

const (
	endsWithClose stormEnding = iota
	endsWithShutdown
)

func newStormPlan(seed uint64) *stormPlan {
	rng := stormRand(seed, 1)
	p := &stormPlan{seed: seed, weather: newStormWeather(rng)}
	w := &p.weather
	p.config = smtprelay.Config{
		Addr:      "relay.example:587",
		LocalName: "client.example",
		TLS:       smtprelay.TLSNone, AllowInsecureAuth: true,
		Pipelining: w.mode,
		Chunking:   w.chunking,
		Limits: smtprelay.Limits{
			MaxConns: w.maxConns, MaxMessagesPerConn: w.maxMessages, MaxRecipients: w.maxRecipients,
			MaxConnAge:  pick(rng, 0, 0, -1, 2*time.Second, 20*time.Second),
			MaxIdleTime: pick(rng, 0, 0, -1, 500*time.Millisecond, 10*time.Second),
		},
		Retry: smtprelay.Retry{
			MaxAttempts: pick(rng, 0, 1, 2, 3, 8),
			MinBackoff:  pick(rng, 0, time.Millisecond, 10*time.Second),
			On4xx:       chance(rng, 30),
		},
		Timeouts: smtprelay.Timeouts{Quit: w.quit},
	}
	if w.calm() {
		p.config.Retry.MaxAttempts = 50
	} else if chance(rng, 50) {
		short := pick(rng, 5*time.Second, 30*time.Second)
		p.config.Timeouts = smtprelay.Timeouts{Dial: short, Greeting: short, TLS: short, Command: short, Data: short, Write: short,
			FinalReply: pick(rng, short, 3*time.Minute), Quit: w.quit}
	}
	if w.auth != "" {
		p.config.Username, p.config.Password = stormUser, stormPassword
	}
	if w.tls {
		p.config.TLS, p.config.TLSConfig = smtprelay.TLSStartTLS, stormTLS().client
	}
	id := 0
	for range pick(rng, 1, 2, 3, 5, 8) {
		var ms []*stormMessage
		for range 1 + rng.IntN(5) {
			ms = append(ms, newStormMessage(rng, id, w))
			id++
		}
		p.senders = append(p.senders, ms)
		p.together = append(p.together, chance(rng, 8))
		p.breakAt = append(p.breakAt, pick(rng, 0, 0, 1, 2))
	}
	p.pings = pick(rng, 0, 0, 0, 1, 2)
	p.ending = pick(rng, endsWithClose, endsWithShutdown)
	if chance(rng, 25) {
		p.endAt = 1 + time.Duration(rng.Int64N(int64(pick(rng, 20*time.Millisecond, time.Second, 20*time.Second))))
	}
	p.grace = pick(rng, time.Minute, time.Minute, time.Second, 0)
	return p
}

// stormLog is the transcript of a run.
type stormLog struct {
	began time.Time

	mu     sync.Mutex // guards the field below
	events []stormEvent
}

type stormEvent struct {
	at        time.Duration
	conn      int // 0 means none
	dir, text string
}

func (l *stormLog) add(conn int, dir, text string) {
	at := time.Since(l.began)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, stormEvent{at, conn, dir, text})
}

// text returns the last events, or all if most is 0.
func (l *stormLog) text(most int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var b strings.Builder
	skip := 0
	if most > 0 && len(l.events) > most {
		skip = len(l.events) - most
		fmt.Fprintf(&b, "    … %d earlier lines; -storm.seed shows all\n", skip)
	}
	for _, e := range l.events[skip:] {
		for line := range strings.SplitSeq(e.text, "\n") {
			fmt.Fprintf(&b, "%12.6fs %3d %s %.200s\n", e.at.Seconds(), e.conn, e.dir, strings.TrimRight(line, "\r"))
		}
	}
	return b.String()
}

// stormTLS makes the relay's certificate, once for all seeds and outside their bubbles.
var stormTLS = sync.OnceValue(newStormTLS)

type stormTLSConfigs struct{ client, server *tls.Config }

func newStormTLS() stormTLSConfigs {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		panic(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{"relay.example"},
		NotBefore:    time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), // bubbles begin in 2000
		NotAfter:     time.Date(2999, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(crand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	cert, err = x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return stormTLSConfigs{
		client: &tls.Config{RootCAs: roots},
		server: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
	}
}
