// Package dialogue plays the transcripts of testdata to the client, in the role of the relay: every command and reply, octet by
// octet. README.md says how to write one. This file has the tests that play them as written, and the player.
package dialogue

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
)

var update = flag.Bool("update", false, "rewrite the C: lines of the scripts that are run with what the client sent")

// TestDialogue plays the transcripts of testdata.
func TestDialogue(t *testing.T) {
	for _, s := range readScripts(t) {
		t.Run(s.name, func(t *testing.T) {
			if *record != "" {
				recordDialogue(t, s)
				return
			}
			d := newDialogue(s)
			err := d.run(t)
			if testing.Verbose() || err != nil {
				t.Logf("%s", d.transcript())
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := d.rewrite(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func readScripts(t *testing.T) (all []*script) {
	files, err := scriptFiles()
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no scripts in %s", scriptDir)
	}
	for _, f := range files {
		s, err := readScript(f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}

// A dialogue is one run of a script: the client, the relay's ends of its connections, the calls.
type dialogue struct {
	script *script
	cut    *cut // nil: nothing is lost, and the client must follow the script
	client *smtprelay.Client
	began  time.Time
	logged bytes.Buffer // what LogTrace wrote
	secret string
	buffer int  // octets that a connection holds in each direction
	single bool // the relay writes byte by byte
	off    bool // the run has left the script: the relay improvises

	dialer func(ctx context.Context, network, addr string) (net.Conn, error) // the client's Config.Dial

	edits []edit // for -update

	mu      sync.Mutex // guards the fields below
	turns   int        // runs of C lines
	said    []said     // data that passed; for planning the cuts
	played  []string   // lines of the script, and bodies, so far
	events  int        // number of events whose order matters: a 354, a final reply, the end of a call
	conns   []*relayConn
	dialing string // the result of a dial: "" a connection, "refuse", or "hang"
	calls   []*call
	log     []string
}

// An edit replaces lines of a script.
type edit struct {
	from, to int // indices into its lines, as of a slice
	lines    []string
}

func newDialogue(s *script) *dialogue {
	d := &dialogue{script: s}
	d.dialer = d.dial
	return d
}

// run plays the script in its own bubble. A goroutine left running in the bubble is an error.
func (d *dialogue) run(t *testing.T) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errors.Join(err, fmt.Errorf("%v", p))
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		d.began = time.Now()
		if err = d.start(); err != nil {
			return
		}
		err = d.play()
		if d.off {
			err = errors.Join(err, d.outlive())
		}
		err = errors.Join(err, d.finish())
	})
	return err
}

// start creates the client that the script asks for.
func (d *dialogue) start() error {
	o := settings{values: map[string]string{}}
	for k, v := range d.script.config {
		o.values[k] = v
	}
	cfg := smtprelay.Config{
		Addr:      o.text("addr", "relay.example:25"),
		LocalName: o.text("localname", "client.example"),
		Username:  o.text("user", ""),
		Password:  o.text("password", ""),
		Limits: smtprelay.Limits{
			MaxConns:           o.number("conns", 1),
			Rate:               float64(o.number("rate", 0)),
			MaxMessagesPerConn: o.number("messages", 0),
			MaxRecipients:      o.number("recipients", 0),
			MaxConnAge:         o.duration("age"),
			MaxIdleTime:        o.duration("idle"),
		},
		MaxInFlight: o.number("in-flight", 0),
		Retry: smtprelay.Retry{
			MaxAttempts: o.number("attempts", 0),
			MinBackoff:  o.duration("minbackoff"),
			MaxBackoff:  o.duration("maxbackoff"),
			On4xx:       o.flag("temporary"),
		},
		Timeouts: smtprelay.Timeouts{
			Dial:       o.duration("dial-timeout"),
			Greeting:   o.duration("greeting-timeout"),
			TLS:        o.duration("tls-timeout"),
			Command:    o.duration("command-timeout"),
			Data:       o.duration("data-timeout"),
			Write:      o.duration("write-timeout"),
			FinalReply: o.duration("final-timeout"),
			Overlap:    o.duration("overlap-timeout"),
			Quit:       o.duration("quit-timeout"),
			Drain:      o.duration("drain-timeout"),
			Outage:     o.duration("outage-timeout"),
		},
		Chunking: o.flag("chunking"),
		Dial:     d.dialer,
	}
	d.secret = cfg.Password
	if d.cut == nil {
		cfg.Trace = smtprelay.LogTrace(slog.New(slog.NewTextHandler(&d.logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
	}
	mode := o.text("tls", "none")
	switch mode {
	case "none":
		cfg.TLS, cfg.AllowInsecureAuth = smtprelay.TLSNone, true
	case "starttls":
		cfg.TLS = smtprelay.TLSStartTLS
	case "implicit":
		cfg.TLS = smtprelay.TLSImplicit
	case "unverified":
		cfg.TLS = smtprelay.TLSStartTLS
	case "byport":
	default:
		return fmt.Errorf("tls=%s", mode)
	}
	if cfg.TLS != smtprelay.TLSNone {
		cfg.TLSConfig = &tls.Config{RootCAs: certificate().roots, InsecureSkipVerify: mode == "unverified"}
	}
	switch v := o.text("pipelining", "across"); v {
	case "across":
	case "within":
		cfg.Pipelining = smtprelay.PipelineWithin
	case "off":
		cfg.Pipelining = smtprelay.PipelineOff
	default:
		return fmt.Errorf("pipelining=%s", v)
	}
	switch v := o.text("auth", ""); v {
	case "":
	case "oauthbearer":
		cfg.Auth = func(ctx context.Context, s smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewOAuthBearerClient(&sasl.OAuthBearerOptions{Username: "a@x.example", Token: "token", Host: s.Name}), nil
		}
	case "expiring":
		asked := 0
		cfg.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			asked++
			return sasl.NewOAuthBearerClient(&sasl.OAuthBearerOptions{Username: "a@x.example", Token: fmt.Sprint("token-", asked)}), nil
		}
	case "external":
		cfg.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewExternalClient(""), nil
		}
	case "fails":
		cfg.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return nil, errors.New("no key today")
		}
	default:
		return fmt.Errorf("auth=%s", v)
	}
	d.buffer = o.number("buffer", 0)
	d.single = o.flag("single-bytes")
	o.take("cut")
	if err := o.rest(); err != nil {
		return fmt.Errorf("%s: config: %v", d.script.name, err)
	}
	client, err := smtprelay.New(cfg)
	d.client = client
	return err
}

// play runs the script, line by line. With a cut it leaves the script as soon as the connection is lost.
func (d *dialogue) play() error {
	var expected []step // C lines that were not compared yet
	steps := d.script.steps
	for i := 0; i < len(steps); i++ {
		s := steps[i]
		if s.kind == 'C' {
			expected = append(expected, s)
			continue
		}
		if err := d.quiet(expected, &s); err != nil {
			return err
		}
		expected = nil
		if d.off && s.kind != '>' && s.kind != '~' {
			continue
		}
		if s.kind != '<' && s.kind != '=' {
			if err := d.unseen(s); err != nil && !d.off {
				return err
			}
		}
		var err error
		switch s.kind {
		case 'S':
			var text string
			ends := false
			for ; ; i++ {
				line, err := d.script.said(steps[i], step{})
				if err != nil {
					return err
				}
				text += line
				ends = ends || steps[i].form == '!'
				d.note(steps[i].String())
				if i+1 == len(steps) || steps[i+1].kind != 'S' || steps[i+1].conn != s.conn {
					break
				}
			}
			err = d.say(s, text, ends)
		case '>':
			err = d.begin(s)
		case '<':
			err = d.ended(s)
		case '~':
			err = d.pass(s)
		case '!':
			err = d.fault(s)
		case '=':
			err = d.count(s)
		}
		if err != nil && d.cut == nil {
			return err
		}
		if s.kind != 'S' {
			d.note(s.String())
		}
	}
	end := step{kind: '=', file: d.script.name, line: len(d.script.lines) + 1, text: "(end of the script)"}
	if err := d.quiet(expected, &end); err != nil || d.off {
		return err
	}
	for _, c := range d.conns {
		if !c.scripted {
			return end.errorf("connection %d was opened, but the script does not mention it", c.n)
		}
	}
	return d.unseen(end)
}

// note records that a line was played.
func (d *dialogue) note(line string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.played = append(d.played, line)
}

// quiet waits until nothing moves. Then the client must have sent exactly what expected says.
func (d *dialogue) quiet(expected []step, next *step) error {
	d.settle(next)
	if d.cut != nil && d.cut.happened() {
		d.improvise()
	}
	if d.off {
		return nil
	}
	var problem error
	var got []string // as lines of a script
	for _, c := range d.conns {
		var mine []step
		for _, s := range expected {
			if s.conn == c.n {
				mine = append(mine, s)
				c.scripted = true
			}
		}
		lines, err := d.heard(c, mine, *next)
		got = append(got, lines...)
		if err != nil && problem == nil {
			problem = err
		}
	}
	for _, s := range expected {
		if s.conn > len(d.conns) {
			problem = s.errorf("there is no connection %d", s.conn)
		}
	}
	switch {
	case problem == nil:
	case d.cut != nil:
		d.improvise() // before the cut the client did something else than in the script, perhaps after a random back-off
	case *update:
		return d.amend(expected, *next, got)
	}
	if d.cut != nil {
		return nil
	}
	return problem
}

// heard compares what the client has sent on c since the last call with the C lines for c. It returns what the client sent, as
// such lines.
func (d *dialogue) heard(c *relayConn, expected []step, next step) (lines []string, err error) {
	got := string(c.take())
	var want strings.Builder
	any, ends, from := false, "", next
	for i, s := range expected {
		if i == 0 {
			from = s
		}
		switch s.form {
		case '*':
			any = true
		case '!':
			ends = s.text
		default:
			var behind step
			if i > 0 {
				behind = expected[i-1]
			}
			text, err := d.script.said(s, behind)
			if err != nil {
				return nil, err
			}
			want.WriteString(text)
		}
	}
	ended := c.clientEnded()
	switch {
	case got == want.String() && !any:
	case any && strings.HasPrefix(got, want.String()) && len(got) > want.Len():
	default:
		err = from.errorf("connection %d: the client sent\n%s\nbut the script has\n%s", c.n, indent(got), indent(want.String()))
	}
	if err == nil && ended != ends {
		err = from.errorf("connection %d: the client's close is %q, in the script it is %q", c.n, ended, ends)
	}
	head := "C"
	if c.n > 1 {
		head += strconv.Itoa(c.n)
	}
	for got != "" {
		line, rest, whole := strings.Cut(got, "\r\n")
		if whole && escape(line) == line {
			lines = append(lines, strings.TrimRight(head+": "+line, " "))
		} else {
			if whole {
				line += "\r\n"
			}
			lines = append(lines, head+"- "+escape(line))
		}
		got = rest
	}
	if ended != "" {
		lines = append(lines, head+"! "+ended)
	}
	return lines, err
}

func indent(text string) string {
	if text == "" {
		return "    (nothing)"
	}
	var b strings.Builder
	for line := range strings.SplitAfterSeq(text, "\n") {
		if line != "" {
			fmt.Fprintf(&b, "    %s\n", strings.TrimSuffix(strings.TrimSuffix(strconv.Quote(line), `"`), `\r\n`)[1:])
		}
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// amend records for rewrite that got replaces the C lines of the script.
func (d *dialogue) amend(expected []step, next step, got []string) error {
	file := filepath.Join(scriptDir, d.script.name+".txt")
	e := edit{from: next.line - 1, to: next.line - 1, lines: got}
	for i, s := range expected {
		if s.file != file {
			return s.errorf("the client sent something else, and -update does not change fragments")
		}
		if i == 0 {
			e.from = s.line - 1
		}
		e.to = s.line
	}
	if next.file != file && len(expected) == 0 {
		return next.errorf("the client sent something here, and -update does not change fragments")
	}
	d.edits = append(d.edits, e)
	return nil
}

// rewrite carries out -update.
func (d *dialogue) rewrite() error {
	if len(d.edits) == 0 {
		return nil
	}
	file := filepath.Join(scriptDir, d.script.name+".txt")
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	lines := strings.Split(string(data), "\n")
	for _, e := range slices.Backward(d.edits) {
		lines = slices.Replace(lines, e.from, e.to, e.lines...)
	}
	return os.WriteFile(file, []byte(strings.Join(lines, "\n")), 0o666)
}

// settle lets all goroutines run until they block, and the relay read everything that was sent.
func (d *dialogue) settle(next *step) {
	for {
		synctest.Wait()
		moved := false
		for _, c := range d.connections() {
			if next != nil && next.kind == '!' && next.conn == c.n && strings.HasPrefix(next.text, "tls") {
				continue // a TLS record, which the handshake will read
			}
			moved = c.drain() || moved
		}
		if !moved {
			return
		}
	}
}

func (d *dialogue) connections() []*relayConn {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.conns)
}

// connection returns the connection that s is about.
func (d *dialogue) connection(s step) (*relayConn, error) {
	conns := d.connections()
	if s.conn > len(conns) {
		return nil, s.errorf("there is no connection %d", s.conn)
	}
	c := conns[s.conn-1]
	c.scripted = true
	return c, nil
}

// say plays an S line, or several.
func (d *dialogue) say(s step, text string, ends bool) error {
	c, err := d.connection(s)
	if err != nil {
		return err
	}
	pieces := []string{text}
	if d.single {
		pieces = strings.Split(text, "")
	}
	for _, p := range pieces {
		if err := c.say(p); err != nil {
			return s.errorf("%v", err)
		}
		if d.single {
			synctest.Wait()
		}
	}
	if ends {
		c.close()
	}
	return nil
}

// pass plays a ~ line.
func (d *dialogue) pass(s step) error {
	t, err := time.ParseDuration(s.text)
	if err != nil {
		return s.errorf("%v", err)
	}
	time.Sleep(t)
	return nil
}

// fault plays a ! line.
func (d *dialogue) fault(s step) error {
	verb, arg, _ := strings.Cut(s.text, " ")
	if verb == "dial" {
		d.mu.Lock()
		defer d.mu.Unlock()
		switch arg {
		case "accept":
			d.dialing = ""
		case "refuse", "hang":
			d.dialing = arg
		default:
			return s.errorf("dial %q?", arg)
		}
		return nil
	}
	c, err := d.connection(s)
	if err != nil {
		return err
	}
	d.logf(c.n, "! %s", s.text)
	switch verb {
	case "close":
		c.close()
	case "fin":
		c.ended.Store(true)
		c.raw.CloseWrite()
	case "reset":
		c.ended.Store(true)
		c.raw.Reset()
	case "stall":
		c.stalled.Store(true)
	case "resume":
		c.stalled.Store(false)
	case "beneath": // below TLS
		c.raw.Write([]byte(strings.TrimPrefix(s.text, "beneath ") + "\r\n"))
	case "deaf":
		c.link.deaf.Store(true)
	case "read":
		n, err := strconv.Atoi(arg)
		if err != nil {
			return s.errorf("%v", err)
		}
		for k := 1; n > 0 && k > 0; n -= k {
			synctest.Wait()
			k = c.read(n)
		}
	case "tls":
		err := c.handshake(arg)
		if fails := arg != ""; fails != (err != nil) {
			return s.errorf("TLS handshake: %v", err)
		}
	default:
		return s.errorf("no such fault")
	}
	return nil
}

// count plays an = line.
func (d *dialogue) count(s step) error {
	fields := strings.FieldsFunc(s.text, func(r rune) bool { return r == ' ' || r == ',' })
	if len(fields)%2 != 0 {
		return s.errorf("want pairs of a name and a number")
	}
	stats := reflect.ValueOf(d.client.Stats())
	aliases := map[string]string{"open": "openconns", "idle": "idleconns"}
	for i := 0; i < len(fields); i += 2 {
		name, want := fields[i], fields[i+1]
		var got any
		switch name {
		case "turns":
			got = d.turns
		case "connections":
			got = len(d.connections())
		default:
			if a, ok := aliases[name]; ok {
				name = a
			}
			f := stats.FieldByNameFunc(func(n string) bool { return strings.ToLower(n) == name })
			if !f.IsValid() {
				return s.errorf("unknown count %s", name)
			}
			got = f.Interface()
		}
		if g := fmt.Sprint(got); g != want {
			return s.errorf("%s is %s, not %s", fields[i], g, want)
		}
	}
	return nil
}

// finish closes everything, and checks that nothing is left.
func (d *dialogue) finish() error {
	if err := d.client.Close(); err != nil {
		return fmt.Errorf("Close: %v", err)
	}
	synctest.Wait()
	var errs []error
	for _, c := range d.connections() {
		c.read(math.MaxInt)
		if !c.link.closed.Load() {
			errs = append(errs, fmt.Errorf("after Close connection %d is open", c.n))
		}
		if c.ledger.inChunk > 0 && c.ledger.last {
			errs = append(errs, fmt.Errorf("connection %d ended within a last chunk, which a relay may accept as the message", c.n))
		}
		c.close()
		c.link.Conn.Close()
	}
	for _, c := range d.calls {
		c.cancel()
	}
	synctest.Wait()
	if s := d.client.Stats(); s.OpenConns != 0 || s.IdleConns != 0 || s.Waiting != 0 {
		errs = append(errs, fmt.Errorf("after Close the Stats are %+v", s))
	}
	errs = append(errs, d.truths(), d.leaks())
	return errors.Join(errs...)
}

// leaks looks for the secret in everything that a program might print.
func (d *dialogue) leaks() error {
	if d.secret == "" {
		return nil
	}
	texts := []string{d.logged.String()}
	for _, c := range d.calls {
		texts = append(texts, fmt.Sprintf("%v %+v %#v", c.err, c.err, c.err), fmt.Sprintf("%+v", c.receipt))
	}
	for _, text := range texts {
		for _, s := range []string{d.secret, base64.StdEncoding.EncodeToString([]byte(d.secret)), base64.StdEncoding.EncodeToString([]byte("\x00apikey\x00" + d.secret))} {
			if i := strings.Index(text, s); i >= 0 {
				return fmt.Errorf("the secret is visible: %q", text[max(0, i-100):i+len(s)])
			}
		}
	}
	return nil
}

func (d *dialogue) logf(conn int, format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := ""
	if conn > 0 {
		name = strconv.Itoa(conn)
	}
	d.log = append(d.log, fmt.Sprintf("%8s %2s ", time.Since(d.began), name)+fmt.Sprintf(format, args...))
}

// transcript is what was sent and done, with the time since the beginning.
func (d *dialogue) transcript() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return "transcript of " + d.script.name + "\n" + strings.Join(d.log, "\n")
}

// dial gives the client one end of an in-memory connection; the relay has the other.
func (d *dialogue) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d.mu.Lock()
	mode := d.dialing
	d.mu.Unlock()
	switch mode {
	case "refuse":
		d.logf(0, "(a dial is refused)")
		return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	case "hang":
		d.logf(0, "(a dial hangs)")
		<-ctx.Done()
		return nil, &net.OpError{Op: "dial", Net: network, Err: ctx.Err()}
	}
	client, relay := netpipe.New(d.buffer)
	c := &relayConn{d: d, raw: relay}
	c.link = &link{Conn: client, relay: c}
	c.ledger.expect("greeting", nil)
	c.ledger.event = func() int {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.events++
		return d.events
	}
	d.mu.Lock()
	d.conns = append(d.conns, c)
	c.n = len(d.conns)
	off := d.off
	d.mu.Unlock()
	d.logf(c.n, "(connected)")
	if off {
		go c.improvise() // ends with the connection
	}
	return c.link, nil
}
