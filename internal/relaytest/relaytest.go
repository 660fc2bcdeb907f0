// Package relaytest is the scripted relay of the tests: a func returns the reply to each line. It has no SMTP state and no rules,
// so it can send anything at any time. For a correct relay that counts what the client does, see smtptest.
package relaytest

import (
	"bufio"
	"context"
	"io"
	"net"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// Relay is a relay that sends what its Answer returns.
type Relay struct {
	// Answer is called for each line of the nth connection, 1-based: with "" when the connection is made, with each command, with
	// a BDAT line once its chunk has arrived, and with "." once a body has arrived, which follows a 354 to DATA. The lines of an
	// answer are separated by \n, without one at the end. "" sends nothing; Hangup at the end closes the connection after the
	// answer. Answer may take its time: the relay does not read meanwhile.
	Answer func(n int, line string) string
	// Body gets the octets of bodies and chunks as they arrive, with dot stuffing; nil discards them.
	Body io.Writer
	// Window is how many octets can be in flight in each direction of a connection that Dial makes; 0 means as many as with TCP.
	// With a Window the relay reads 16 octets ahead of its answers, without one 64 KiB.
	Window int

	conns atomic.Int64
}

// Hangup at the end of an answer closes the connection after it.
const Hangup = "\x04"

// Dial returns the Dial method of a new relay with this Window and Answer.
func Dial(window int, answer func(n int, line string) string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return (&Relay{Answer: answer, Window: window}).Dial
}

// Dial is for Config.Dial. It connects to the relay in memory, and works in a synctest bubble.
func (r *Relay) Dial(context.Context, string, string) (net.Conn, error) {
	n := int(r.conns.Add(1))
	client, server := netpipe.New(r.Window)
	go r.Serve(server, n) // ends with the connection
	return client, nil
}

// Listen serves connections on a loopback socket, until the listener is closed.
func (r *Relay) Listen() (net.Listener, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() { // ends when l is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go r.Serve(conn, int(r.conns.Add(1))) // ends with the connection
		}
	}()
	return l, nil
}

// Serve serves conn as the relay's nth connection, until one side closes it.
func (r *Relay) Serve(conn net.Conn, n int) {
	defer conn.Close()
	readAhead := 64 << 10
	if r.Window > 0 {
		readAhead = 16
	}
	in := bufio.NewReaderSize(conn, readAhead)
	body := r.Body
	if body == nil {
		body = io.Discard
	}
	for line := ""; ; {
		text, over := strings.CutSuffix(r.Answer(n, line), Hangup)
		if text != "" {
			if _, err := io.WriteString(conn, strings.ReplaceAll(text, "\n", "\r\n")+"\r\n"); err != nil {
				return
			}
		}
		if over || line == "QUIT" {
			return
		}
		if line == "DATA" && strings.HasPrefix(text, "354") {
			if err := copyBody(body, in); err != nil {
				return
			}
			line = "."
			continue
		}
		command, err := in.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimRight(command, "\r\n")
		if size, ok := strings.CutPrefix(line, "BDAT "); ok {
			size, _, _ = strings.Cut(size, " ")
			octets, _ := strconv.ParseInt(size, 10, 64)
			if _, err := io.CopyN(body, in, octets); err != nil {
				return
			}
		}
	}
}

// copyBody copies the body of DATA, and reads the final dot.
func copyBody(to io.Writer, in *bufio.Reader) error {
	for begun := false; ; { // the beginning of the current line has been copied
		part, err := in.ReadSlice('\n')
		switch {
		case err != nil && err != bufio.ErrBufferFull:
			return err
		case !begun && string(part) == ".\r\n":
			return nil
		}
		if _, err := to.Write(part); err != nil {
			return err
		}
		begun = err == bufio.ErrBufferFull
	}
}

// Octets counts the octets written to it.
type Octets struct{ atomic.Int64 }

// Write implements io.Writer.
func (o *Octets) Write(p []byte) (int, error) {
	o.Add(int64(len(p)))
	return len(p), nil
}

// Agree is the Answer of a relay that accepts everything. extensions is the rest of its reply to EHLO after the first line, such as
// "250-PIPELINING\n250 CHUNKING".
func Agree(extensions, line string) string {
	switch {
	case line == "":
		return "220 hi"
	case strings.HasPrefix(line, "EHLO"):
		return "250-hi\n" + extensions
	case line == "DATA":
		return "354 go"
	case line == "BDAT 8": // the client's probe for refused chunks, without MAIL
		return "503 MAIL first"
	case line == "QUIT":
		return "221 bye"
	case strings.HasPrefix(line, "AUTH"):
		return "235 ok"
	}
	return "250 ok"
}
