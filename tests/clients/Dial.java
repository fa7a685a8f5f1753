import java.io.IOException;
import java.net.Socket;

/** Dial HOST PORT: request / over HTTP and print the answer. Java always uses IPv6 sockets. */
public class Dial {
    public static void main(String[] words) throws IOException {
        try (Socket socket = new Socket(words[0], Integer.parseInt(words[1]))) {
            socket.getOutputStream().write("GET / HTTP/1.0\r\n\r\n".getBytes());
            socket.getInputStream().transferTo(System.out);
        }
        System.out.flush();
    }
}
