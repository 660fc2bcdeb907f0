// Package smtptest provides a fake relay for tests of programs that send mail, as net/http/httptest provides a web server.
//
// A [Server] is a relay on loopback or in memory, with TLS, AUTH and limits. It behaves well until a test sets a [Fault]. A Fault
// names a step of the dialogue (At), filters the events there (Conn, Nth, AfterMessages, When), and says what goes wrong (Reply,
// Drop, Stall, Delay) and how often (Count). Messages returns the mail that has arrived; Stats and Conns return the counters.
//
//	relay := smtptest.New(t)  // started; closed when the test ends
//	client := relay.Client(t) // address, roots and credentials filled in; closed before the relay
//	lost := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Nth: 3, Drop: true})
//	// … the code under test …
//	err := relay.Wait(ctx, 2)     // until two messages have arrived
//	first := relay.Messages()[0]  // envelope, body, connection
//	hits := lost.Hits()           // how often the fault struck
//	most := relay.Stats().MaxOpen // the largest number of connections open at once
//
// Without a testing.TB, create a relay with [NewServer] or [NewUnstartedServer], take its address from [Server.Config] or
// [Server.URL], and end it with [Server.Close]. Set fields between [NewUnstartedServer] and [Server.Start], or in the functions
// that [New] takes. A long-running relay can have its own Listener, limit how much it remembers (Keep), and report
// events (OnMessage, OnLine).
//
// A relay replies like SendGrid and, like SendGrid's classic allowance, accepts 10 connections and 100 messages on each. It is
// stricter than most relays, so that a test finds a client's mistake before a customer does. It requires TLS before AUTH if it
// offers STARTTLS, and refuses parameters of extensions that it has not offered. It closes the connection of a client that sends
// before the greeting, pipelines without PIPELINING, or sends anything after EHLO or DATA without waiting for the reply. It is
// lenient about addresses.
//
// # What real relays do
//
// A refused recipient, sender or message; a message that the relay accepts but whose reply is lost:
//
//	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "bob@example.org", Reply: "550 5.1.1 no such user"})
//	relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: "550 5.7.1 not you"})
//	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "554 5.7.1 looks like spam"})
//	relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
//
// A limit of messages or recipients per session. Relays report it at MAIL, RCPT or DATA, each in its own words, and keep the
// connection open or close it. Server.MaxMessages, which counts MAIL commands, is SendGrid's limit:
//
//	relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 5, Reply: "452 4.4.5 Maximum number of messages per session exceeded", Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, AfterRecipients: 100, Reply: "452 4.5.3 Too many recipients in this session", Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 5, Reply: "421 4.7.0 Too many messages", Drop: true, Count: -1})
//
// A session that forgets its login (530, 503, 502 or 550 to MAIL). Good credentials that are refused, every tenth time from the
// second on, or slowly:
//
//	relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 2, Reply: "530 5.7.1 Authentication required", Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Auth, Nth: 2, Every: 10, Reply: "535 5.7.8 Authentication failed", Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Auth, Delay: 20 * time.Second, Reply: "535 5.7.8 Authentication failed"})
//
// A relay that objects to commands pipelined after AUTH. It answers AUTH with 503 (500, 554, 535, 421), hangs up at once or after
// 235, discards the commands, or ignores the initial response; or it answers 235 and then refuses each MAIL of that connection,
// or only the first. The same Fault at another step, or without a step, does this for other commands:
//
//	relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Reply: "503 5.5.1 Bad sequence of commands", Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Drop: true, Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Reply: "235 2.7.0 Accepted", Drop: true, Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Discard: true, Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Auth, Pipelined: true, Reply: "334 ", Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Mail, When: func(e smtptest.Event) bool { return e.AuthLed }, Reply: "530 5.7.0 Log in first", Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Mail, When: func(e smtptest.Event) bool { return e.AuthLed && e.N == 1 }, Reply: "451 4.7.0 Not yet", Count: -1})
//
// A relay that accepts 14 messages a second and throttles more, at MAIL or after the message. It uses the clock of package time:
//
//	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Rate: 14, Burst: 14, Reply: "454 Throttling failure: Maximum sending rate exceeded.", Count: -1})
//
// A greeting that never comes, silence at a step of one connection, and a slow reply:
//
//	relay.Fault(smtptest.Fault{At: smtptest.Connect, Conn: 2, Stall: true})
//	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Conn: 2, Stall: true})
//	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: 5 * time.Second})
//
// One of several addresses of a name is draining, or silent, if Server.Addresses is more than 1. For how a client reaches it see
// [Server.Addrs], [Server.Dial] and [Server.Resolver]:
//
//	relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 2, Reply: "421 4.3.2 draining", Drop: true, Count: -1})
//	relay.Fault(smtptest.Fault{At: smtptest.Connect, Addr: 2, Stall: true, Count: -1})
//
// A relay that restarts, resets connections, or closes idle ones, which is how most connections end:
//
//	relay.CloseClientConnections()
//	relay.Fault(smtptest.Fault{At: smtptest.Body, AfterBytes: 1000, Abort: true})
//	relay.Fault(smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Reply: "421 4.4.2 timeout", Drop: true, Count: -1})
//
// Fields of Server set permanent behaviour: Behind (commands pipelined after a final dot), KeepRefusedChunks (a refused chunk is
// read as commands), Chunking (a truncated last chunk is accepted), KeepEnvelopeOnRset (a transaction survives RSET), Without and
// Extensions (the reply to EHLO).
//
// # In a synctest bubble
//
// With InMemory the relay uses no sockets, and its goroutines block only in ways that testing/synctest recognises. Start and
// close it inside the bubble. With Delay, the time that a dialogue takes is then exact.
//
// # Manual use
//
// go test -run '^TestBroken$' -smtptest.serve=127.0.0.1:2525 starts the first relay of the test on this address, prints its URL,
// and blocks, so that you can talk to the relay.
package smtptest
