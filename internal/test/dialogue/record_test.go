// -record, which writes the transcript of a real relay.
package dialogue

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

var record = flag.String("record", "", "host:port of a relay that a script is to be recorded with, for review")

// recordDialogue makes the calls of s, one after another, to a real relay, and writes the dialogue as a script beside it. What
// was sent in one write is one run of C: lines, which is the purpose of a recording; it has no ~ lines.
func recordDialogue(t *testing.T, s *script) {
	tape := &tape{}
	d := newDialogue(s)
	dialer := net.Dialer{Timeout: 10 * time.Second}
	d.dialer = func(ctx context.Context, network, _ string) (net.Conn, error) {
		conn, err := dialer.DialContext(ctx, network, *record)
		if err != nil {
			return nil, err
		}
		return tape.on(conn), nil
	}
	d.began = time.Now()
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
	for _, st := range s.steps {
		if st.kind != '>' {
			continue
		}
		tape.add("> " + st.text)
		if err := d.begin(st); err != nil {
			t.Fatal(err)
		}
		d.mu.Lock()
		c := d.calls[len(d.calls)-1]
		d.mu.Unlock()
		<-c.ended
		d.mu.Lock()
		tape.add(fmt.Sprintf("< %s %s", c.name, c.outcome()))
		d.mu.Unlock()
	}
	if err := d.client.Close(); err != nil {
		t.Error(err)
	}
	head := []string{"# recorded from " + *record + "; review it before it becomes a script"}
	for _, line := range s.lines {
		if strings.HasPrefix(line, "# config:") {
			head = append(head, line)
		}
	}
	text := strings.Join(append(head, tape.lines...), "\n") + "\n"
	for name, body := range s.sections {
		text += "-- " + name + " --\n" + body
	}
	file := filepath.Join(scriptDir, s.name+".recorded")
	if err := os.WriteFile(file, []byte(text), 0o666); err != nil {
		t.Fatal(err)
	}
	t.Logf("wrote %s", file)
}

// A tape records the data of connections as lines of a script.
type tape struct {
	mu    sync.Mutex // guards the fields below
	lines []string
	conns int
}

func (p *tape) add(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines = append(p.lines, line)
}

func (p *tape) on(conn net.Conn) net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns++
	n := ""
	if p.conns > 1 {
		n = fmt.Sprint(p.conns)
	}
	return &taped{Conn: conn, tape: p, number: n}
}

type taped struct {
	net.Conn
	tape        *tape
	number      string
	read, wrote bytes.Buffer // incomplete lines
}

func (c *taped) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.note("S", &c.read, p[:n])
	return n, err
}

func (c *taped) Write(p []byte) (int, error) {
	c.note("C", &c.wrote, p) // before the relay can reply
	return c.Conn.Write(p)
}

func (c *taped) note(who string, rest *bytes.Buffer, text []byte) {
	rest.Write(text)
	for {
		line, err := rest.ReadString('\n')
		if err != nil {
			rest.WriteString(line)
			return
		}
		c.tape.add(who + c.number + ": " + escape(strings.TrimRight(line, "\r\n")))
	}
}
