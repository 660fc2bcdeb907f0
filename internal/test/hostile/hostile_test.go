package hostile

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Malicious relays, on real sockets: whatever the relay does at whatever step, a Send ends by itself with a truthful *Error, and
// nothing is left. The steps with a relay that works are tested by the dialogues.

const (
	accepted    = smtprelay.Accepted
	notAccepted = smtprelay.NotAccepted
	unknown     = smtprelay.Unknown
)

// scenario is one thing that a relay does.
type scenario struct {
	name string
	at   step
	do   func(*conn, string)
	want smtprelay.Outcome // of a message by DATA; in chunks, what may be sent with its envelope may be Unknown
	with string            // what else is needed: "tls", "auth", "data" for a scenario that makes no sense in chunks
	race bool              // Unknown is right too: it depends on how far the client is
	body int               // octets; 0 means a few
}

var longQueueID = strings.Repeat("x", 15_000)

var scenarios = []scenario{
	// Before the first command.
	{name: "lines of a greeting without end", at: greeting, do: flood("", "220-hello\r\n"), want: notAccepted},
	{name: "a greeting without line end", at: greeting, do: flood("220 ", "hello "), want: notAccepted},
	{name: "a greeting of NUL octets", at: greeting, do: flood("", "\x00"), want: notAccepted},
	{name: "empty lines as a greeting", at: greeting, do: flood("", "\r\n"), want: notAccepted},
	{name: "a greeting in drips", at: greeting, do: drip("220-hello\r\n", true), want: notAccepted},
	{name: "a line of 10 MB", at: greeting, do: say("220 " + strings.Repeat("x", 10<<20) + "\r\n"), want: notAccepted},
	{name: "no greeting", at: greeting, do: silent, want: notAccepted},
	{name: "greeting and reply to EHLO in one write", at: greeting, do: also("", "250-relay.example\r\n250 PIPELINING\r\n"), want: notAccepted},
	{name: "354 as a greeting", at: greeting, do: say("354 go ahead\r\n"), want: notAccepted},
	{name: "100 as a greeting", at: greeting, do: say("100 continue\r\n"), want: notAccepted},
	{name: "999 as a greeting", at: greeting, do: say("999 hello\r\n"), want: notAccepted},
	{name: "another protocol", at: greeting, do: say("HTTP/1.1 400 Bad Request\r\n\r\n"), want: notAccepted},

	// EHLO.
	{name: "10,000 keywords", at: ehlo, do: say("250-hi\r\n" + numbered("250-X-KEYWORD-%d\r\n", 10_000) + "250 SIZE\r\n"), want: notAccepted},
	{name: "1,000 keywords are read in part", at: ehlo, do: say("250-hi\r\n" + numbered("250-X-KEYWORD-%d\r\n", 1000) + "250 SIZE\r\n"), want: accepted},
	{name: "four lines of mechanisms", at: ehlo, do: say("250-hi\r\n" + strings.Repeat("250-AUTH"+numbered(" M%d", 2000)+"\r\n", 4) + "250 SIZE\r\n"), want: accepted},
	{name: "keywords without end", at: ehlo, do: flood("", "250-X-KEYWORD\r\n"), want: notAccepted},
	{name: "a negative SIZE, and limits of nothing", at: ehlo, do: say("250-hi\r\n250-SIZE -1\r\n250-LIMITS MAILMAX=0 RCPTMAX=-5\r\n250 DELIVERBY 99999999999999999999\r\n"), want: accepted},
	{name: "354 to EHLO", at: ehlo, do: say("354 go ahead\r\n"), want: notAccepted},

	// STARTTLS and TLS.
	{name: "octets after the reply to STARTTLS", at: startTLS, do: also("", "250 injected\r\n"), want: notAccepted, with: "tls"},
	{name: "354 to STARTTLS", at: startTLS, do: say("354 go ahead\r\n"), want: notAccepted, with: "tls"},
	{name: "garbage instead of TLS", at: tlsStart, do: flood("", "garbage"), want: notAccepted, with: "tls"},
	{name: "a TLS record that never ends", at: tlsStart, do: then(say("\x16\x03\x03\x3f\xff"), silent), want: notAccepted, with: "tls"},
	{name: "a handshake in drips", at: tlsStart, do: drip("\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03"+strings.Repeat("x", 64), true), want: notAccepted, with: "tls"},
	{name: "empty TLS records without end", at: tlsStart, do: flood("", "\x16\x03\x03\x00\x00"), want: notAccepted, with: "tls"},
	{name: "TLS warnings without end", at: tlsStart, do: flood("", "\x15\x03\x03\x00\x02\x01\x5a"), want: notAccepted, with: "tls"},
	{name: "a handshake message of 16 MB", at: tlsStart, do: flood("\x16\x03\x03\x40\x00\x02\xff\xff\xff", "\x16\x03\x03\x40\x00"), want: notAccepted, with: "tls"},
	{name: "a plaintext reply instead of TLS", at: tlsStart, do: then(say("421 too many\r\n"), hangUp), want: notAccepted, with: "tls"},

	// AUTH.
	{name: "challenges that PLAIN does not know", at: auth, do: flood("", "334 \r\n"), want: notAccepted, with: "auth"},
	{name: "a challenge of many lines", at: auth, do: flood("", "334-QUJD\r\n"), want: notAccepted, with: "auth"},
	{name: "354 to AUTH", at: auth, do: say("354 go ahead\r\n"), want: notAccepted, with: "auth"},
	{name: "a refusal of 60 KB", at: auth, do: say(strings.Repeat("535-"+strings.Repeat("x", 9_996)+"\r\n", 6) + "535 no\r\n"), want: notAccepted, with: "auth"},

	// The envelope.
	{name: "354 to MAIL", at: mail, do: say("354 go ahead\r\n"), want: notAccepted, with: "data"},
	{name: "an extra reply to MAIL", at: mail, do: also("", "250 and once more\r\n"), want: notAccepted, with: "data"},
	{name: "all replies at once, and then again", at: mail, do: say("250 ok\r\n250 ok\r\n354 go ahead\r\n250 2.0.0 queued\r\n"), want: notAccepted, with: "data"},
	{name: "a code that changes within a reply", at: mail, do: say("250-ok\r\n550 no\r\n"), want: notAccepted},
	{name: "354 to RCPT", at: rcpt, do: say("354 go ahead\r\n"), want: notAccepted},
	{name: "251 and 252 to RCPT are as good as 250", at: rcpt, do: say("252 maybe\r\n"), want: accepted},
	{name: "421 to RCPT, then as usual", at: rcpt, do: say("421 leaving\r\n"), want: notAccepted},
	{name: "250 to DATA", at: data, do: say("250 ok\r\n"), want: notAccepted, with: "data"},
	{name: "354 twice", at: data, do: also("354 go ahead\r\n", ""), want: notAccepted, with: "data", race: true},
	{name: "a refusal of many lines, each with a queue ID", at: data, do: say(strings.Repeat("554-queued as 4F1D2\r\n", 2000) + "554 no\r\n"), want: notAccepted, with: "data"},

	// The body.
	{name: "a window that stays closed", at: body, do: silentUnread, want: notAccepted, body: 32 << 20},
	{name: "reads one octet of the body now and then", at: body, do: sip, want: notAccepted, body: 32 << 20},
	{name: "closes within the body", at: body, do: hangUp, want: notAccepted, body: 32 << 20},
	{name: "resets within the body", at: body, do: reset, want: notAccepted, body: 32 << 20},
	{name: "a flood within the body", at: body, do: flood("", "250 ok\r\n"), want: notAccepted, body: 32 << 20},

	// The end.
	{name: "354 to the end", at: end, do: say("354 go ahead\r\n"), want: unknown},
	{name: "half a reply to the end", at: end, do: then(say("250-2.0.0 queued as 4F1D2\r\n"), hangUp), want: unknown},
	{name: "half a line to the end", at: end, do: then(say("250 2.0.0 queued as 4F1D2"), hangUp), want: unknown},
	{name: "a line end that is missing", at: end, do: then(say("250 2.0.0 queued as 4F1D2"), silent), want: unknown},
	{name: "a queue ID of 15,000 characters", at: end, do: say("250 2.0.0 queued as " + longQueueID + "\r\n"), want: accepted},
	{name: "a queue ID of control octets", at: end, do: say("250 2.0.0 queued as \x1b[2J\x00\x07\r\n"), want: accepted},
	{name: "250 and a flood", at: end, do: then(say("250 2.0.0 queued as 4F1D2\r\n"), flood("", "250 2.0.0 queued as 5\r\n")), want: accepted},
	{name: "a refusal and a flood of consent", at: end, do: then(say("554 5.7.1 no\r\n"), flood("", "250 2.0.0 queued\r\n")), want: notAccepted, race: true},

	// Afterwards.
	{name: "a flood while idle", at: idle, do: flood("", "250 ok\r\n"), want: accepted},
	{name: "a flood without line end while idle", at: idle, do: flood("", "x"), want: accepted},
	{name: "drips while idle", at: idle, do: drip("250-x\r\n", true), want: accepted},
	{name: "a flood after QUIT", at: quit, do: flood("221 bye\r\n", "221 bye\r\n"), want: accepted},
	{name: "a flood without line end as the reply to QUIT", at: quit, do: flood("", "x"), want: accepted},
	{name: "drips after QUIT", at: quit, do: drip("221-bye\r\n", true), want: accepted},
	{name: "never closes", at: quit, do: then(say("221 bye\r\n"), silent), want: accepted},
}

// everywhere are scenarios for each step that has a reply.
func everywhere() (all []scenario) {
	with := map[step]string{startTLS: "tls", auth: "auth", data: "data"}
	for _, at := range []step{greeting, ehlo, startTLS, auth, mail, rcpt, data, end} {
		broken := notAccepted
		if at == end {
			broken = unknown
		}
		for _, s := range []scenario{
			{name: "lines without end", do: flood("", "250-and another\r\n"), want: broken},
			{name: "a line without end", do: flood("250 ", "x"), want: broken},
			{name: "lines without end in drips", do: drip("250-x\r\n", true), want: broken},
			{name: "the right reply in drips", do: drip(strings.Repeat("250-x\r\n", 500), false), want: broken},
			{name: "NUL octets", do: flood("", "\x00"), want: broken},
			{name: "150", do: say("150 well\r\n"), want: broken},
			{name: "silence", do: silent, want: broken},
			{name: "hangs up", do: hangUp, want: broken},
			{name: "resets", do: reset, want: broken},
			{name: "421 and the end", do: then(say("421 4.3.2 leaving\r\n"), hangUp), want: notAccepted},
			{name: "421 and a flood", do: then(say("421 4.3.2 leaving\r\n"), flood("", "250 ok\r\n")), want: notAccepted, race: at == end},
		} {
			if s.name == "421 and a flood" && (at == mail || at == rcpt) {
				s.with = "data" // in chunks the flood is positive replies to what was sent
			} else {
				s.with = with[at]
			}
			s.name, s.at = string(at)+": "+s.name, at
			all = append(all, s)
		}
	}
	return all
}

// silentUnread stops reading and waits for the client to close, which it notices without reading.
func silentUnread(c *conn, _ string) { waitClosed(c, 0) }

// sip reads an octet now and then.
func sip(c *conn, _ string) { waitClosed(c, 1) }

func waitClosed(c *conn, octets int) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	buf := make([]byte, octets)
	for range 60 {
		if _, err := c.br.Read(buf); err != nil {
			break
		}
		<-tick.C
	}
	c.gone = true
}

func numbered(format string, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

// The most that a scenario may cost, besides the body.
const (
	mostAllocated = 32 << 20
	mostFlood     = 64 << 20 // octets: several times what the sockets' own buffers hold
)

func TestHostileRelays(t *testing.T) {
	server := httptest.NewUnstartedServer(nil)
	server.StartTLS()
	certificates, roots := server.TLS.Certificates, x509.NewCertPool()
	roots.AddCert(server.Certificate())
	server.Close()
	for _, s := range append(scenarios, everywhere()...) {
		for _, chunking := range []bool{false, true} {
			if chunking && s.with == "data" {
				continue
			}
			t.Run(s.name+map[bool]string{true: ", in chunks"}[chunking], func(t *testing.T) {
				r := &relay{at: s.at, act: s.do, offers: "PIPELINING"}
				if chunking {
					r.offers += ",CHUNKING"
				}
				cfg := smtprelay.Config{LocalName: "client.example", TLS: smtprelay.TLSNone, Retry: smtprelay.Retry{MaxAttempts: 1}}
				cfg.Timeouts = limits(s)
				if s.with == "tls" {
					r.tls = &tls.Config{Certificates: certificates}
					cfg.TLS, cfg.TLSConfig = smtprelay.TLSStartTLS, &tls.Config{RootCAs: roots}
				}
				if s.with == "auth" {
					r.offers += ",AUTH PLAIN LOGIN"
					cfg.Username, cfg.Password = "user", "a-password-of-some-length"
				}
				attack(t, s, chunking, r, cfg)
			})
		}
	}
}

// limits makes the step at which the relay attacks end soon, and leaves time for the others.
func limits(s scenario) smtprelay.Timeouts {
	const short, long = 50 * time.Millisecond, giveUp / 2
	t := smtprelay.Timeouts{Dial: long, Greeting: long, TLS: long, Command: long, Data: long, Write: long, FinalReply: long, Overlap: long, Quit: short}
	if s.want == accepted {
		return t
	}
	switch s.at {
	case greeting:
		t.Greeting = short
	case tlsStart:
		t.TLS = short
	case data:
		t.Data, t.Command = short, short // in chunks it is a command
	case body:
		t.Write = short
	case end:
		t.FinalReply = short
	default:
		t.Command = short
	}
	return t
}

// attack sends one message to r and checks the result, and what is left.
func attack(t *testing.T, s scenario, chunking bool, r *relay, cfg smtprelay.Config) {
	text := []byte("Subject: hostile\r\n\r\n" + strings.Repeat(strings.Repeat("x", 70)+"\r\n", 1+s.body/72))
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	cfg.Addr = r.listener.Addr().String()
	client, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), giveUp)
	receipt, err := client.Send(ctx, smtprelay.Message{
		From: "a@x.example", To: []string{"b@y.example", "c@y.example"}, Body: smtprelay.Bytes(text)})
	if ctx.Err() != nil {
		t.Errorf("Send did not end by itself: %v", err)
	}
	cancel()
	outcome := accepted
	if err != nil {
		e, ok := errors.AsType[*smtprelay.Error](err)
		if !ok {
			t.Fatalf("%T: %v, want an *Error", err, err)
		}
		if outcome = e.Outcome; len(e.Error()) > 8<<10 || len(e.Reply.Message) > 2<<10 {
			t.Errorf("an error of %d octets with a reply of %d", len(e.Error()), len(e.Reply.Message))
		}
	}
	may := []smtprelay.Outcome{s.want}
	if s.race || s.want == notAccepted && chunking {
		may = append(may, unknown)
	}
	if !slices.Contains(may, outcome) {
		t.Errorf("%v: %v, want %v", outcome, err, may)
	}
	if outcome == accepted && s.at != end && r.accepted.Load() == 0 {
		t.Errorf("accepted, but the relay has accepted nothing")
	}
	if len(receipt.QueueID) > 128 || strings.ContainsFunc(receipt.QueueID, func(c rune) bool { return c < ' ' || c > '~' }) {
		t.Errorf("queue ID of %d octets: %.80q", len(receipt.QueueID), receipt.QueueID)
	}
	shut, cancel := context.WithTimeout(t.Context(), giveUp)
	defer cancel()
	if err := client.Shutdown(shut); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	r.stop()
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > mostAllocated {
		t.Errorf("%d octets were allocated, want at most %d", n, mostAllocated)
	}
	if n := r.flooded.Load(); n > mostFlood {
		t.Errorf("the client read %d octets of the flood, want at most %d", n, mostFlood)
	}
	settled(t, "goroutines", goroutines, func() int { return runtime.NumGoroutine() })
	settled(t, "files", files, func() int { return openFiles(t) })
}

// settled waits until a count is back to what it was.
func settled(t *testing.T, what string, before int, now func() int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 2000 {
		if now() <= before {
			return
		}
		<-tick.C
	}
	t.Errorf("%d %s, and %d before", now(), what, before)
}

// openFiles counts the descriptors of this process; 0 if the system does not tell.
func openFiles(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(entries)
}

// A relay refuses each of 5,000 recipients with a different reply of 64 KB.
func TestLongRefusalsOfManyRecipientsAreTruncated(t *testing.T) {
	const recipients, most = manyRecipients, 20 << 20
	line := strings.Repeat("x", 15<<10)
	refused := 0
	r := &relay{at: rcpt, offers: "PIPELINING", patience: time.Minute, act: func(c *conn, _ string) {
		refused++
		c.say(fmt.Sprintf("550-%d %s\r\n550-%s\r\n550-%s\r\n550-%s\r\n550 no\r\n", refused, line, line, line, line))
	}}
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	defer r.stop()
	var heap uint64
	inUse := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	client, err := smtprelay.New(smtprelay.Config{Addr: r.listener.Addr().String(), TLS: smtprelay.TLSNone, Retry: smtprelay.Retry{MaxAttempts: 1},
		Trace: &smtprelay.Trace{SendDone: func(context.Context, smtprelay.SendDoneInfo) { heap = inUse() }}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	m := smtprelay.Message{From: "a@x.example", Body: smtprelay.Bytes([]byte("Subject: no\r\n\r\nno\r\n"))}
	for i := range recipients {
		m.To = append(m.To, fmt.Sprintf("r%d@y.example", i))
	}
	before := inUse()
	receipt, err := client.Send(t.Context(), m)
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok || len(e.Recipients) != recipients || e.Outcome != smtprelay.NotAccepted || receipt.Recipients[recipients-1].Reply.Code != 550 || refused != recipients {
		t.Fatalf("%.200v: want %d recipients refused", err, recipients)
	}
	if heap > before+most {
		t.Errorf("the heap has grown by %d octets, want at most %d", heap-before, most)
	}
}
