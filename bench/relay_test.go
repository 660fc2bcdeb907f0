package main

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// sleeping replaces an alarm in a synctest bubble.
type sleeping struct{}

func (sleeping) waitUntil(t time.Time) { time.Sleep(time.Until(t)) }
func (sleeping) close()                {}

// serveRelay starts a relay in memory, and returns functions to dial it and to end it. Without TLS no certificate is used.
func serveRelay(cfg relayConfig) (dial func() (net.Conn, error), finish func() relayReport) {
	ln := netpipe.Listen(64 << 10)
	cert, _, err := selfSigned()
	if err != nil {
		panic(err)
	}
	r := newRelay(cfg, ln, cert)
	go r.serve(func() sleeper { return sleeping{} })
	return func() (net.Conn, error) { return ln.Dial() }, r.finish
}

// config is for a relay 20 ms away.
func config() relayConfig {
	return relayConfig{RTT: 20 * time.Millisecond, TLS: tlsNone, Chunking: true, MaxConns: maxConns, MaxMessages: maxMessages}
}

// drive runs a peer against a relay in memory.
func drive(t *testing.T, cfg relayConfig, j job, run func(job, *source, *tally) error) (*tally, relayReport, time.Duration) {
	t.Helper()
	dial, finish := serveRelay(cfg)
	j.dial, j.Host, j.Port, j.TLS = dial, "localhost", 25, cfg.TLS
	total := &tally{from: time.Now()}
	if err := run(j, newSource(j.Messages, 0), total); err != nil {
		t.Error(err)
	}
	took := time.Duration(total.last.Load())
	return total, finish(), took
}

func TestTurnsAreThoseOfThePeer(t *testing.T) {
	for _, tc := range []struct {
		name    string
		run     func(job, *source, *tally) error
		senders int
		depth   int
		conns   int
		turns   int // on each connection, including opening
		asking  int // further turns on the first connection, for the probe for refused chunks
		refused int // commands: the probe's chunk out of order, once for the address
		why     string
	}{
		{"raw DATA", runRawData, 10, 0, 2, 104, 0, 0, "SYN, ACK, EHLO and the envelope with AUTH; then one for each body"},
		{"raw DATA, one sender", runRawData, 1, 0, 2, 203, 0, 0, "the same, but a separate turn for each envelope but the first"},
		{"raw CHUNKING", runRawChunking, 4, 4, 2, 28, 0, 0, "SYN, ACK, EHLO; then one for each four"},
		{"raw CHUNKING, deep", runRawChunking, 25, 25, 2, 7, 0, 0, "SYN, ACK, EHLO; then one for each 25"},
		{"raw CHUNKING, one sender", runRawChunking, 1, 4, 2, 103, 0, 0, "SYN, ACK, EHLO; then one each"},
		{"two round trips", runTwoRoundTrips, 10, 0, 2, 205, 0, 0, "SYN, ACK, EHLO, AUTH; two each; QUIT"},
		{"mox", runMox, 10, 0, 2, 205, 0, 0, "the same"},
		{"smtprelay", runSmtprelayData, 10, 0, 2, 104, 1, 0, "the same as raw DATA, but AUTH goes alone on the first connection"},
		{"smtprelay, one sender", runSmtprelayData, 1, 0, 2, 203, 1, 0, "the same"},
		{"smtprelay, CHUNKING", runSmtprelay, 10, 4, 2, 30, 2, 1, "SYN, ACK, EHLO, AUTH with the first envelope, since no chunk is sent right after AUTH; the first body with the " +
			"second envelope, which waits for its replies; then one for each four of 99. On the first connection AUTH goes alone, then the probe, then the envelope"},
		{"smtprelay, CHUNKING, one sender", runSmtprelay, 1, 4, 2, 104, 2, 1, "the same, except that nothing follows the first body; then one each"},
		{"smtprelay, CHUNKING, deep", runSmtprelayDeep, 100, 25, 2, 9, 2, 1, "the same as with four; then one for each 25 of 99"},
		{"net/smtp kept", runNetSMTP, 10, 0, 2, 405, 0, 0, "SYN, ACK, EHLO, AUTH; four each; QUIT"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := job{Senders: tc.senders, Size: 3000, Conns: 1, Rotate: 100, InFlight: tc.depth, Messages: 100 * tc.conns}
				total, rep, took := drive(t, config(), j, tc.run)
				if total.sent.Load() != int64(j.Messages) || rep.Accepted != j.Messages || rep.Duplicates+rep.Unnamed != 0 {
					t.Errorf("sent %d; accepted %d, %d twice, %d without a name; want %d once each",
						total.sent.Load(), rep.Accepted, rep.Duplicates, rep.Unnamed, j.Messages)
				}
				if rep.Turns != tc.conns*tc.turns+tc.asking || rep.Connections != tc.conns {
					t.Errorf("%d turns on %d connections; want %d on each of %d, and %d more on the first: %s",
						rep.Turns, rep.Connections, tc.turns, tc.conns, tc.asking, tc.why)
				}
				if rep.Refused+rep.OverLimit != 0 || rep.Violations != tc.refused {
					t.Errorf("%d connections and %d messages over the limits, %d commands refused; want %d refused",
						rep.Refused, rep.OverLimit, rep.Violations, tc.refused)
				}
				// In a bubble only waits take time: the duration is the number of turns.
				if want := time.Duration(rep.Turns) * 20 * time.Millisecond; took != want {
					t.Errorf("took %v for turns that take %v", took, want)
				}
			})
		})
	}
}

// runSmtprelayData makes smtprelay use DATA with a relay that offers CHUNKING.
func runSmtprelayData(j job, src *source, t *tally) error {
	cfg := smtprelayConfig(j)
	cfg.Chunking = false
	return runSmtprelayWith(cfg, j, src, t)
}

func TestRelayIsStrict(t *testing.T) {
	// say writes text to a new connection and returns everything that the relay replies until it waits for more, or closes.
	say := func(t *testing.T, dial func() (net.Conn, error), text string) string {
		t.Helper()
		conn, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		go io.WriteString(conn, text)
		time.Sleep(time.Second)
		conn.(*netpipe.Conn).CloseWrite()
		b, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		return string(b)
	}
	ready := "EHLO x\r\n" + authPlain
	body := string(newMessage(0)) + ".\r\n"
	for _, tc := range []struct {
		name, text string
		want       string // the codes of all replies, after the greeting
	}{
		{"a whole message", ready + rawData + body + rawQuit, "250 235 250 250 354 250 221"},
		{"no AUTH", "EHLO x\r\n" + rawMail, "250 530 503"},
		{"a wrong password", "EHLO x\r\nAUTH PLAIN AGEAYg==\r\n", "250 535"},
		{"LOGIN", "EHLO x\r\nAUTH LOGIN\r\nYmVuY2g=\r\nY29ycmVjdCBob3JzZSBiYXR0ZXJ5IHN0YXBsZQ==\r\n", "250 334 334 235"},
		{"MAIL in a transaction", ready + rawMail + rawMail, "250 235 250 250 503 250"},
		{"DATA without RCPT", ready + "DATA\r\n", "250 235 503"},
		{"a bare LF", "EHLO x\n", "500"},
		{"BDAT", ready + rawMail + fmt.Sprintf("BDAT 10\r\n0123456789BDAT %d LAST\r\n%s", len(body), body) + rawQuit, "250 235 250 250 250 250 221"},
		{"the chunk of a refused BDAT", ready + "BDAT 6 LAST\r\nQUIT\r\n" + rawMail, "250 235 503 250 250"},
		{"BDAT with an empty last chunk", ready + rawMail + "BDAT 10\r\n0123456789" + rawLast + rawQuit, "250 235 250 250 250 250 221"},
		{"BDAT out of order, RSET", ready + "BDAT 8\r\nXCHUNK\r\n" + rawRset + rawMail + "BDAT 10\r\n0123456789" + rawLast, "250 235 503 250 250 250 250 250"},
		{"BDAT out of order, no RSET", ready + "BDAT 8\r\nXCHUNK\r\n" + rawMail + rawLast, "250 235 503 250 250 250"},
		{"BDAT after a refused one", ready + "MAIL FROM:<" + sender + ">\r\nBDAT 6\r\nQUIT\r\nRCPT TO:<" + recipient + ">\r\n" + rawLast, "250 235 250 503 250 503"},
		{"an empty message", ready + rawData + ".\r\n" + rawQuit, "250 235 250 250 354 250 221"},
		{"RSET", ready + rawMail + rawRset + "DATA\r\n", "250 235 250 250 250 503"},
		{"STARTTLS that is not offered", "EHLO x\r\nSTARTTLS\r\n", "250 503"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dial, finish := serveRelay(config())
				answers := say(t, dial, tc.text)
				finish()
				var codes []string
				for line := range strings.Lines(answers) {
					if line[3] != '-' {
						codes = append(codes, line[:3])
					}
				}
				if got := strings.Join(codes, " "); got != "220 "+tc.want {
					t.Errorf("got %s, want 220 %s", got, tc.want)
				}
			})
		})
	}
	t.Run("one connection too many", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cfg := config()
			cfg.MaxConns = 1
			dial, finish := serveRelay(cfg)
			first, err := dial()
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			if got := say(t, dial, ""); !strings.HasPrefix(got, "421 ") {
				t.Errorf("the second connection got the greeting %q", got)
			}
			first.Close()
			time.Sleep(time.Second)
			if got := say(t, dial, ""); !strings.HasPrefix(got, "220 ") {
				t.Errorf("after the first closed, the third got the greeting %q", got)
			}
			if rep := finish(); rep.Refused != 1 || rep.MaxOpen != 1 {
				t.Errorf("%d refused, %d open at once; want 1, 1", rep.Refused, rep.MaxOpen)
			}
		})
	})
	t.Run("one message too many, and one twice", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cfg := config()
			cfg.MaxMessages = 2
			dial, finish := serveRelay(cfg)
			got := say(t, dial, ready+strings.Repeat(rawData+body, 3))
			if !strings.HasSuffix(got, "421 4.7.0 too many messages on this connection\r\n") {
				t.Errorf("the third message got the reply %q", got)
			}
			if rep := finish(); rep.OverLimit != 1 || rep.Accepted != 2 || rep.Duplicates != 1 {
				t.Errorf("%d over the limit, %d accepted, %d twice; want 1, 2, 1", rep.OverLimit, rep.Accepted, rep.Duplicates)
			}
		})
	})
}

func TestBodiesAreRecognisedHoweverTheyAreSplit(t *testing.T) {
	text := "EHLO x\r\n" + authPlain + rawData + string(newMessage(200)) + "..\r\n.x\r\n\r\n.\r\n" + rawQuit
	for size := range len(text) {
		synctest.Test(t, func(t *testing.T) {
			dial, finish := serveRelay(relayConfig{TLS: tlsNone, MaxConns: 1, MaxMessages: 1})
			conn, err := dial()
			if err != nil {
				t.Fatal(err)
			}
			for rest := text; rest != ""; {
				n := min(size+1, len(rest))
				io.WriteString(conn, rest[:n])
				rest = rest[n:]
				synctest.Wait()
			}
			answers, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if rep := finish(); rep.Accepted != 1 || rep.Unnamed != 0 || rep.Violations != 0 || !strings.HasSuffix(string(answers), "221 2.0.0 bye\r\n") {
				t.Errorf("in pieces of %d: %+v, %q", size+1, rep, answers)
			}
		})
	}
}

func TestTLSGoesThroughTheLine(t *testing.T) {
	cert, roots, err := selfSigned()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", writeFile(t, roots)) // read once, by the first mode
	for mode, turns := range map[tlsMode]int{tlsImplicit: 6, tlsStart: 8} {
		t.Run(string(mode), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := netpipe.Listen(64 << 10)
				r := newRelay(relayConfig{RTT: 20 * time.Millisecond, TLS: mode, MaxConns: 1, MaxMessages: 1}, ln, cert)
				go r.serve(func() sleeper { return sleeping{} })
				j := job{
					Host: "localhost", TLS: mode, Senders: 1, Conns: 1, Rotate: 1, Size: 1000, Messages: 2, Resume: true,
					dial: func() (net.Conn, error) { return ln.Dial() },
				}
				err := runRawData(j, newSource(2, 0), &tally{from: time.Now()})
				rep := r.finish()
				if err != nil {
					t.Fatal(err)
				}
				if got := [2]int{rep.medianTurns(false), rep.medianTurns(true)}; got != [2]int{turns, turns} {
					t.Errorf("%d turns to the first receipt with a full handshake, %d with a resumed session; want %d for both", got[0], got[1], turns)
				}
			})
		})
	}
}
