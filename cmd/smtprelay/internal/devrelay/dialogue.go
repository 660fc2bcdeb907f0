package devrelay

import (
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay/smtptest"
)

// What is remembered of dialogues, so that memory is bounded.
const (
	keepConns    = 200 // closed connections
	keepLines    = 400 // lines of each connection
	keepRefusals = 500
	longestLine  = 500 // octets of a line
)

// Connection is what has happened on a connection so far.
type Connection struct {
	N         int        `json:"n"` // counted from 1
	Client    string     `json:"client"`
	Opened    time.Time  `json:"opened"`
	Closed    *time.Time `json:"closed"` // nil while it is open
	TLS       bool       `json:"tls"`
	Turns     int        `json:"turns"` // round trips that the client has spent
	Messages  int        `json:"messages"`
	Refusals  int        `json:"refusals"`
	LineCount int        `json:"line_count"` // the number of the last line
	Doing     string     `json:"doing"`      // the last line that either side has said
}

// Line is a line of a dialogue.
type Line struct {
	N       int       `json:"n"`   // counted from 1 on each connection
	Who     string    `json:"who"` // "client", "relay" or "note"
	Text    string    `json:"text"`
	Turn    int       `json:"turn"` // how many turns the connection had had
	TLS     bool      `json:"tls"`
	Time    time.Time `json:"time"`
	Refusal bool      `json:"refusal,omitempty"` // a 4xx or 5xx reply
	Message string    `json:"message,omitempty"` // the queue ID of the message that has arrived
}

// Refusal is a 4xx or 5xx reply.
type Refusal struct {
	N          uint64    `json:"n"` // counted from 1
	Connection int       `json:"connection"`
	Command    string    `json:"command"` // what was refused
	Reply      string    `json:"reply"`
	Time       time.Time `json:"time"`
}

// dialogues follows all connections.
type dialogues struct {
	changed func()

	mu       sync.Mutex // guards the fields below
	conns    []*dialogue
	closed   int // of conns
	rev      uint64
	refusals []Refusal // the latest
	refused  uint64    // all there were
	strikes  uint64    // of faults
}

type dialogue struct {
	Connection
	lines   []Line
	command string // the client's last
}

func newDialogues(changed func()) *dialogues { return &dialogues{changed: changed} }

// findLocked returns the connection with the number, or nil.
func (d *dialogues) findLocked(n int) *dialogue {
	i, ok := slices.BinarySearchFunc(d.conns, n, func(c *dialogue, n int) int { return c.N - n })
	if !ok {
		return nil
	}
	return d.conns[i]
}

// line takes a line of the relay's transcript.
func (d *dialogues) line(l smtptest.Line) {
	d.mu.Lock()
	c := d.findLocked(l.Conn)
	if c == nil { // "opened by" may come after that of a later connection
		c = &dialogue{Connection: Connection{N: l.Conn, Opened: l.Time}}
		i, _ := slices.BinarySearchFunc(d.conns, l.Conn, func(c *dialogue, n int) int { return c.N - n })
		d.conns = slices.Insert(d.conns, i, c)
	}
	c.Turns, c.TLS = l.Turn, c.TLS || l.TLS
	line := Line{Text: shortLine(l.Text), Turn: l.Turn, TLS: l.TLS, Time: l.Time}
	switch l.Who {
	case "C":
		line.Who, c.command = "client", line.Text
		if l.Text == "." {
			line.Text = ". (end of the message)"
			c.command = line.Text
		}
	case "S":
		line.Who = "relay"
		line.Refusal = len(l.Text) >= 3 && (l.Text[0] == '4' || l.Text[0] == '5')
		if line.Refusal && (len(l.Text) == 3 || l.Text[3] != '-') {
			d.refuseLocked(c, line)
		}
	default:
		line.Who = "note"
		d.noteLocked(c, l)
	}
	if line.Who != "note" {
		c.Doing = line.Text
	}
	d.appendLocked(c, line)
	d.mu.Unlock()
	d.changed()
}

// noteLocked reads what smtptest tells of a connection.
func (d *dialogues) noteLocked(c *dialogue, l smtptest.Line) {
	if client, ok := strings.CutPrefix(l.Text, "opened by "); ok {
		c.Client = client
	}
	if strings.HasPrefix(l.Text, "fault at ") {
		d.strikes++
	}
	if l.Text == "closed" {
		c.Closed = &l.Time
		d.closed++
		for d.closed > keepConns {
			oldest := slices.IndexFunc(d.conns, func(c *dialogue) bool { return c.Closed != nil })
			d.conns = slices.Delete(d.conns, oldest, oldest+1)
			d.closed--
		}
	}
}

func (d *dialogues) refuseLocked(c *dialogue, l Line) {
	c.Refusals++
	d.refused++
	command := c.command
	if command == "" {
		command = "(connecting)"
	}
	d.refusals = append(d.refusals, Refusal{N: d.refused, Connection: c.N, Command: command, Reply: l.Text, Time: l.Time})
	if len(d.refusals) > keepRefusals {
		d.refusals = d.refusals[1:]
	}
}

func (d *dialogues) appendLocked(c *dialogue, l Line) {
	d.rev++
	c.LineCount++
	l.N = c.LineCount
	c.lines = append(c.lines, l)
	if len(c.lines) > keepLines {
		c.lines = c.lines[1:]
	}
}

// arrived notes that the relay has taken a message.
func (d *dialogues) arrived(m smtptest.Message) {
	d.mu.Lock()
	if c := d.findLocked(m.Conn); c != nil {
		c.Messages++
		d.appendLocked(c, Line{Who: "note", Text: "message of " + strconv.FormatInt(m.Size, 10) + " octets taken", Turn: c.Turns, TLS: c.TLS, Time: m.Received, Message: m.ID})
	}
	d.mu.Unlock()
	d.changed()
}

// shortLine returns what is shown of a line: a client may send any octets.
func shortLine(text string) string {
	if len(text) > longestLine {
		text = text[:longestLine] + "…"
	}
	return strings.ToValidUTF8(text, "\uFFFD")
}

// list returns the latest connections, the latest first.
func (d *dialogues) list(limit int) []Connection {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := []Connection{}
	for _, c := range slices.Backward(d.conns) {
		if len(list) == limit {
			break
		}
		list = append(list, c.Connection)
	}
	return list
}

// get returns a connection and its lines after the one with the number after. Lines that are forgotten are missing.
func (d *dialogues) get(n, after int) (Connection, []Line, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.findLocked(n)
	if c == nil {
		return Connection{}, nil, false
	}
	lines := []Line{}
	for _, l := range c.lines {
		if l.N > after {
			lines = append(lines, l)
		}
	}
	return c.Connection, lines, true
}

// latestRefusals returns the latest refusals, the latest first.
func (d *dialogues) latestRefusals(limit int) []Refusal {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := slices.Clone(d.refusals[max(0, len(d.refusals)-limit):])
	slices.Reverse(list)
	return list
}
